"""The self-teacher: whose weights it has, and what it reads."""
