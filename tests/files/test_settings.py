"""Settings as dictionaries and YAML: what is written is read again, and what does not fit is named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml

from avfast.errors import InputError
from avfast.files.settings import Count, Share, Side, check_values, convert, from_dict, load_config, to_dict


@dataclass(frozen=True)
class Tone:
    name: ClassVar[str] = "tone"

    hertz: float = 440.0
    range: tuple[int, int] = (20, 20_000)


@dataclass(frozen=True)
class Noise:
    name: ClassVar[str] = "noise"

    colour: Literal["white", "pink"] = "white"


@dataclass(frozen=True)
class Track:
    # a field, so no class name
    name: str = "track"
    source: Any = Tone()
    channels: Literal[1, 2] = 1
    limit: int | None = None
    loud: bool = False
    gains: tuple[float, ...] = ()


CHOICES = {"source": {"tone": Tone, "noise": Noise}}


def test_what_is_written_is_read_again(tmp_path: Path):
    track = Track(source=Noise("pink"), limit=3, gains=(0.5, 1.0), loud=True)
    values = to_dict(track)
    assert list(values) == ["name", "source", "channels", "limit", "loud", "gains"]
    assert list(values["source"].items()) == [("name", "noise"), ("colour", "pink")]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    assert load_config(tmp_path / "a.yaml", Track(), CHOICES) == track


def test_nested_tuples_are_lists():
    assert to_dict(Track())["source"] == {"name": "tone", "hertz": 440.0, "range": [20, 20_000]}


def test_a_name_without_choices_must_be_that_of_the_settings():
    assert from_dict(Track(), {"source": {"name": "tone", "hertz": 1}}, "a").source == Tone(1.0)
    with pytest.raises(InputError, match="^a: source: name is 'noise', expected one of tone$"):
        from_dict(Track(), {"source": {"name": "noise"}}, "a")


def test_a_table_changes_only_what_it_holds():
    own = Track(source=Tone(range=(1, 2)))
    assert from_dict(own, {"source": {"name": "tone", "hertz": 1}}, "a", CHOICES).source == Tone(1.0, (1, 2))
    assert from_dict(own, {"source": {"name": "noise"}}, "a", CHOICES) == replace(own, source=Noise())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"chanels": 1}, "a: unknown key 'chanels' (did you mean 'channels'?)"),
        ({"source": {"hertz": "high"}}, "a: hertz is 'high', expected a number"),
        ({"source": {"herz": 1}}, "a: unknown key 'herz' (did you mean 'hertz'?)"),
        (
            {"source": {"name": ["tone"]}},
            "a: source: name is ['tone'] (did you mean 'tone'?), expected one of tone, noise",
        ),
        ({"source": 3}, "a: source is 3, expected a table"),
        ({"channels": 3}, "a: channels is 3, expected one of 1, 2"),
        # in Python True == 1
        ({"channels": True}, "a: channels is True, expected one of 1, 2"),
        ({"limit": True}, "a: limit is True, expected a whole number"),
        ({"limit": 1.5}, "a: limit is 1.5, expected a whole number"),
        ({"loud": "yes"}, "a: loud is 'yes', expected true or false"),
        ({"loud": 1}, "a: loud is 1, expected true or false"),
        ({"name": 3}, "a: name is 3, expected text"),
        ({"gains": 1.0}, "a: gains is 1.0, expected a list, each a number"),
        ({"source": {"range": [1]}}, "a: range is [1], expected a list of 2, each a whole number"),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, Any], message: str):
    with pytest.raises(InputError) as error:
        from_dict(Track(), values, "a", CHOICES)
    assert str(error.value) == message


@dataclass(frozen=True)
class Ranged:
    """Settings with ranges."""

    count: Count | None = None
    share: Share = 0.5
    sides: tuple[Side, Side] = (1, 1)
    paths: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"


@pytest.mark.parametrize(
    "settings,message",
    [
        (Ranged(count=0), "count is 0, expected at least 1"),
        (Ranged(count=True), "count is True, expected a whole number"),
        (Ranged(count="3"), "count is '3', expected a whole number"),  # type: ignore[arg-type]
        (Ranged(share=float("nan")), "share is nan, expected at least 0 and at most 1"),
        (Ranged(share=1.5), "share is 1.5, expected at least 0 and at most 1"),
        (Ranged(sides=(4, 0)), "sides is 0, expected at least 1 and at most 16384"),
        (Ranged(sides=(4,)), "sides is .4,., expected a list of 2, each a whole number"),  # type: ignore[arg-type]
        (Ranged(paths="one"), "paths is 'one', expected a list, each text"),  # type: ignore[arg-type]
        (Ranged(kind="c"), "kind is 'c', expected one of a, b"),  # type: ignore[arg-type]
    ],
)
def test_values_set_in_python_are_checked(settings: Ranged, message: str):
    with pytest.raises(InputError, match=message):
        check_values(settings)


def test_values_that_are_right():
    check_values(Ranged(count=3, share=1, sides=[2, 3], paths=["a"]))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="over: share is 2.0, expected at least 0 and at most 1"):
        from_dict(Ranged(), {"share": "2"}, "over")


def test_numbers_that_yaml_takes_for_text():
    assert yaml.safe_load("1e-4") == "1e-4"
    assert convert(float, "1e-4", "a") == 1e-4 and convert(int | None, "3", "a") == 3
    assert convert(str, "3", "a") == "3" and convert(str | None, None, "a") is None


@pytest.mark.parametrize("text, message", [("[", "is not YAML"), ("- 1", "holds list, expected keys and values")])
def test_a_file_that_is_no_table(text: str, message: str, tmp_path: Path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "a.yaml", Track())
