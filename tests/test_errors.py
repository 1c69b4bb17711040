"""The form in which mistakes are reported."""

import errno
import os

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smoltrain.errors import (
    Problem,
    TrainingStopped,
    UserError,
    abbreviate_list,
    exception_message,
    format_error,
    format_value,
    iterate_causes,
    problem_from_pydantic,
    problem_from_system,
    suggest_choice,
)


class Values(BaseModel):
    """One field for each kind of value that a recipe can hold."""

    model_config = ConfigDict(allow_inf_nan=False)

    whole: int = Field(default=1, gt=0)
    real: float = 1.0
    flag: bool = True
    text: str = ""
    name: str = Field(default="", pattern="^[a-z]*$")
    many: tuple[str, ...] = ()


def test_a_problem_says_what_saw_want_and_change():
    assert str(Problem("too wide", "3", "2", "model.x")) == "too wide: saw 3, want 2; change model.x"


def test_every_problem_is_a_line_of_its_own():
    error = UserError(Problem("a", "1", "2", "x"), Problem("b", "3", "4", "y"))
    assert format_error(error) == "error: a: saw 1, want 2; change x\nerror: b: saw 3, want 4; change y"
    assert format_error(TrainingStopped("the loss is nan")) == "error: the loss is nan"


def test_the_nearest_choice_else_all_of_them():
    assert suggest_choice("hiden_size", ["hidden_size", "norm"]) == "'hidden_size' (the nearest valid one)"
    assert suggest_choice("zzz", {"b": 1, "a": 2}) == "one of a, b"


@pytest.mark.parametrize("value", ["a\nb", "x" * 1000, list(range(1000)), None])
def test_a_value_is_shown_on_one_short_line(value: object):
    assert "\n" not in format_value(value)
    assert len(format_value(value)) <= 60


@pytest.mark.parametrize(
    ("field", "value", "want"),
    [
        ("whole", "abc", "a whole number"),
        ("whole", None, "a whole number"),
        ("whole", 1.5, "a whole number"),
        ("whole", "9" * 5000, "a whole number"),
        ("whole", "0", "greater than 0"),
        ("real", "abc", "a number"),
        ("real", None, "a number"),
        ("real", "inf", "a finite number"),
        ("flag", "perhaps", "true or false"),
        ("text", ["a"], "text"),
        ("name", "A b", "a plain name, as in main-2"),
        ("many", "a", "a list, as in [a, b]"),
    ],
)
def test_pydantic_speaks_plainly(field: str, value: object, want: str):
    with pytest.raises(ValidationError) as caught:
        Values.model_validate({field: value})
    (error,) = caught.value.errors()
    assert problem_from_pydantic("a.b", error, "here") == Problem("a.b is not valid", format_value(value), want, "here")


def test_of_many_things_the_first_three_are_named():
    assert abbreviate_list(["a", "b", "c"]) == "a, b, c"
    assert abbreviate_list([str(i) for i in range(1004)]) == "0, 1, 2 and 1,001 more"
    assert abbreviate_list([]) == ""


def test_an_exception_is_one_line():
    assert exception_message(ValueError("no\n such  thing ")) == "no such thing"
    assert exception_message(TimeoutError()) == "TimeoutError"


def test_the_causes_of_an_error_with_and_without_those_that_were_only_being_handled():
    try:
        try:
            try:
                raise KeyError("in the cache")
            except KeyError:
                raise OSError("no route")  # noqa: B904
        except OSError as error:
            raise ValueError("not loaded") from error
    except ValueError as error:
        outer = error
    assert [type(cause) for cause in iterate_causes(outer)] == [ValueError, OSError]
    assert [type(cause) for cause in iterate_causes(outer, implicit=True)] == [ValueError, OSError, KeyError]


@pytest.mark.parametrize(
    ("number", "name", "said"),
    [
        (
            errno.ENOSPC,
            "a.png",
            "a file cannot be written: saw No space left on device, want some free space; change a",
        ),
        (errno.ENOSPC, None, "want some free space; change what fills the disk, or where the file goes"),
        (errno.EDQUOT, "a.png", "want some room in this user's quota; change a.png"),
        (errno.EROFS, "a.png", "a file or folder cannot be used: saw Read-only file system, want one that is there"),
        (errno.ENOENT, "a.png", "saw No such file or directory, want one that is there"),
    ],
)
def test_what_the_system_refuses_is_a_problem(number: int, name: str | None, said: str):
    assert said in str(problem_from_system(OSError(number, os.strerror(number), name)))


@pytest.mark.parametrize("error", [OSError("of a library"), ConnectionError(errno.ECONNRESET, "reset")])
def test_other_errors_of_the_system_are_faults_of_ours(error: OSError):
    assert problem_from_system(error) is None
