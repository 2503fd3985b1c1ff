"""A schedule uses the time of a run, and no more."""

from hypothesis import given, settings
from hypothesis import strategies as st

from segkit.planning.schedule import Schedule, schedule_within


@given(st.floats(0.5, 600.0), st.floats(1e-3, 60.0), st.floats(0.0, 100.0), st.integers(0, 300))
@settings(max_examples=100)
def test_validations_take_a_tenth_of_the_time_and_everything_fits(
    minutes: float, per_step: float, per_case: float, held_out: int
) -> None:
    schedule = schedule_within(
        minutes, seconds_per_step=per_step, seconds_per_case=per_case, held_out=held_out
    )
    count = schedule.steps // schedule.validate_every
    cases = held_out if schedule.validation_cases is None else schedule.validation_cases
    looking = min(count, 10) * cases * per_case
    assert looking <= 6.001 * minutes
    assert f"{schedule.steps:,} steps fit into the rest" in schedule.why_steps
    if schedule.steps > 20:
        assert schedule.steps * per_step + looking <= 60 * minutes * 1.15
    assert 1 <= schedule.validate_every <= schedule.steps


def test_steps_get_the_time_left_by_preparing_validating_and_scoring() -> None:
    # 10 validations of 2 cases of 1 s, 2 s of scoring and 30 s of preparing leave 548 s.
    schedule = schedule_within(10.0, seconds_per_step=0.5, seconds_per_case=1.0, held_out=2)
    assert (schedule.steps, schedule.validation_cases) == (1096, None)
    assert schedule.validate_every == 105
    # 60 s hold three validations of 2 cases of 9 s, and scoring all 10 takes 90 s.
    schedule = schedule_within(10.0, seconds_per_step=0.5, seconds_per_case=9.0, held_out=10)
    assert (schedule.steps, schedule.validation_cases) == (852, 2)
    told = "30 s are reserved for preparing, 54 s for 3 validations of 2 cases and 90 s for the fin"
    assert told in schedule.why_steps
    # 60 s hold one validation of a case of 59 s, and none of a case of 61 s; scoring takes 150 s.
    schedule = schedule_within(10.0, seconds_per_step=0.5, seconds_per_case=59.0, held_out=10)
    assert (schedule.steps, schedule.validation_cases) == (722, 1)
    assert "59 s for 1 validation of 1 case and" in schedule.why_steps
    schedule = schedule_within(10.0, seconds_per_step=0.5, seconds_per_case=61.0, held_out=10)
    assert (schedule.steps, schedule.validation_cases) == (840, 0)
    assert "There is no validation, as a single case takes 61 s" in schedule.why_steps
    schedule = schedule_within(10.0, seconds_per_step=0.5, seconds_per_case=9.0, held_out=0)
    assert (schedule.steps, schedule.validation_cases) == (1140, None)
    assert "No case is held out, so there are no scores" in schedule.why_steps


def test_cases_that_take_long_to_prepare_leave_less_time_for_steps() -> None:
    def planned(preparing: float) -> Schedule:
        return schedule_within(
            10.0, seconds_per_step=0.5, seconds_per_case=1.0, held_out=2, preparing=preparing
        )

    assert planned(29.0).steps == planned(0.0).steps == 1096
    slow = planned(230.0)
    assert slow.steps == 1096 - 400 and "230 s are reserved for preparing" in slow.why_steps


def test_time_that_planning_took_is_not_for_steps() -> None:
    schedule = schedule_within(
        10.0, seconds_per_step=0.5, seconds_per_case=1.0, held_out=2, spent=90.0
    )
    assert schedule.steps == 1096 - 180
    assert "Of 10 minutes, 90 s are for planning, 30 s are reserved for prep" in schedule.why_steps


def test_a_case_that_takes_longer_than_a_quarter_of_the_time_is_scored_within_it() -> None:
    # 3 s are for preparing, and there is no validation.
    schedule = schedule_within(1.0, seconds_per_step=0.5, seconds_per_case=27.0, held_out=5)
    assert schedule.steps == 60  # in 30 s
    assert "27 s for the final scores" in schedule.why_steps
    assert "longer than its time" not in schedule.why_steps
    schedule = schedule_within(1.0, seconds_per_step=0.5, seconds_per_case=41.0, held_out=5)
    assert schedule.steps == 54 and "30 s for the final scores" in schedule.why_steps
    told = "At least one case is scored, so the run takes about 11 s longer than its time."
    assert told in schedule.why_steps
