"""Names of files that every system can write."""

import logging

import pytest

from segkit.io.file_names import LONGEST_FILE_NAME, is_file_name, safe_name, tell_changed_names


@pytest.mark.parametrize(
    "name",
    [
        *["case 1", "sub-01_ses-b", "Müller", "a.b", ".a", "1.2.840.113619.2.5", "console", "com"],
        *["com10", "lpt", "auxiliary", "nul_1", "x.con", "a+b=c,d;e'f(g)[h]{i}~!@#$%^&"],
    ],
)
def test_names_that_every_system_can_write_are_file_names(name: str) -> None:
    assert is_file_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *["", ".", "..", "a/b", "a\\b", "a\nb", "a\tb", "a\0b"],
        *[f"a{character}b" for character in '<>:"|?*'],
        *["2024-01-01T12:30:00", "a.", "a ", "a. ", "...", " "],
        *["con", "CON", "Prn", "aux", "NUL", "com1", "COM9", "lpt1", "LPT9", "COM¹", "com0"],
        *["nul.x", "CON.b.c", "aux ", "con .x"],
    ],
)
def test_names_that_windows_cannot_write_are_no_file_names(name: str) -> None:
    assert not is_file_name(name)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("skip.2/gate", "skip.2-gate"),
        ("left kidney", "left kidney"),
        ('a<b>c:d"e/f\\g|h?i*j\nk l\x07m', "a-b-c-d-e-f-g-h-i-j-k l-m"),
        ("2024-01-01T12:30", "2024-01-01T12-30"),
        ("a. ", "a--"),
        ("..", "--"),
        (" ", "-"),
        ("", "unnamed"),
        ("CON", "CON-"),
        ("nul .nii", "nul-.nii"),
        ("caf\udce9", "caf-"),  # a byte that is not UTF-8
        ("患者 一", "患者 一"),
    ],
)
def test_only_characters_that_file_names_cannot_have_are_replaced(name: str, safe: str) -> None:
    assert safe_name(name) == safe
    assert safe_name(safe) == safe and is_file_name(safe)


def test_long_names_are_cut_and_stay_different() -> None:
    one, other = ("ä" * 120 + end for end in "ab")
    assert len(safe_name(one)) == 70 + 9  # 70 letters of two bytes, a dash, and eight digits
    assert safe_name(one) != safe_name(other)
    assert len(safe_name(one).encode()) < LONGEST_FILE_NAME - len("_entropy")
    assert is_file_name("a" * LONGEST_FILE_NAME) and not is_file_name("a" * (LONGEST_FILE_NAME + 1))


def test_changed_names_are_told_in_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tell_changed_names(["a", "b"])
        assert not caplog.messages
        tell_changed_names(["a", "12:30", "b?", "12:30"])
    (said,) = caplog.messages
    assert said.endswith("'12:30' becomes '12-30', 'b?' becomes 'b-'")
