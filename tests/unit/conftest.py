from hypothesis import HealthCheck, settings

# The same examples in every run, and no limit in time: the machine may be busy.
settings.register_profile(
    "unit",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("unit")
