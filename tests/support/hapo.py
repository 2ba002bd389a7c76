"""HAPO on the toy: a short run, and the record of a run."""

from pgpo_lightning.monitoring.run_record import RunRecord

HAPO_LIMITS = {"max_prompt_length": 64, "max_response_length": 32}


def record(folder, rates, first=1, curve="hapo/gate_open"):
    curves = {curve: [list(range(first, first + len(rates))), rates]}
    run = RunRecord("s", "a", 0, len(rates), 8, 1.0, 1.0, curves if rates else {}, {})
    run.save(folder / "run.json")
    return str(folder)
