"""Read the program from a response."""

import re

PYTHON = ("", "py", "python", "python3")

_BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[ \t]*$", re.MULTILINE)


def program(response: str, variant: str) -> str | None:
    """Return the program of a response, or none.

    ``reference`` takes the longest fenced block, ``livecodebench`` what stands between the last two lines with a fence.
    ``strict`` takes the last complete block that is marked as Python or not marked.
    """
    if variant == "reference":
        blocks = [body for _, body in _BLOCK.findall(response)]
        return max(blocks, key=len) if blocks else None
    if variant == "livecodebench":
        lines = response.split("\n")
        fences = [number for number, line in enumerate(lines) if "```" in line]
        return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else None
    found = None
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(response):
        if opening is None:
            opening = fence
        elif not fence[1]:
            if opening[1].lower() in PYTHON:
                found = response[opening.end() + 1 : fence.start()]
            opening = None
        else:
            opening = fence  # a block that was not closed
    return found


def cut_off(response: str) -> bool:
    """Return whether a response ends within a fenced block, as one that was cut at the length limit does."""
    return response.count("```") % 2 == 1
