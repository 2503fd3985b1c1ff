"""What is timed of a processor is timed once."""

from pathlib import Path

from segkit.planning.speed import measured_once, multiply_adds_per_second


def test_the_measured_speed_is_that_of_a_processor() -> None:
    assert 1e8 < multiply_adds_per_second() < 1e14


def test_a_figure_of_the_processor_is_measured_once(tmp_path: Path) -> None:
    values = iter([3.5, 4.5, 5.5, 6.5])
    file = tmp_path / "cache" / "speed.json"

    def measured(**figure: object) -> float:
        return measured_once(file, figure, lambda: next(values))

    assert [measured(patch=(1, 2)), measured(patch=(1, 2))] == [3.5, 3.5]
    assert [measured(patch=(1, 3)), measured(patch=(1, 2)), measured(patch=(1, 3))] == [
        4.5,
        3.5,
        4.5,
    ]
    for damaged in ("{", '{"measured": [3]}'):
        file.write_text(damaged)
        assert measured(patch=(1, 2)) > 4.5
