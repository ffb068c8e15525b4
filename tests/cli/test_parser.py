"""Command lines of settings: values, messages, help, and the settings that a flag or a file chooses by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import tyro

from avfast.cli.parser import parse
from avfast.errors import InputError
from avfast.evaluate import EvaluateConfig
from avfast.training.config import PRESETS, TrainConfig


class Shape:
    """What the settings of all shapes have in common: nothing."""


@dataclass(frozen=True)
class Circle(Shape):
    """A circle."""

    name: ClassVar[str] = "circle"

    radius: int = 3
    """Radius in pixels."""
    filled: bool = True


@dataclass(frozen=True)
class Square(Shape):
    """A square."""

    name: ClassVar[str] = "square"

    side: float = 2.0
    """Side in pixels."""
    colour: Literal["red", "green"] = "red"


@dataclass(frozen=True)
class Drawing:
    """A drawing."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = ()
    """Where it is drawn."""
    shape: Any = Circle()
    layers: Literal[1, 2] = 1
    size: tuple[int, int] | None = None
    """Width and height."""
    weights: tuple[float, ...] = ()
    title: str | None = "untitled"


SHAPES = {"shape": {"shape": {"circle": Circle, "square": Square}}}


def drawing(line: str, **options: Any) -> Drawing:
    return parse(Drawing, prog="draw", argv=line.split(), choices=SHAPES, **options)


def shown(line: str, capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    """What the command line prints before it ends."""
    with pytest.raises(SystemExit) as stop:
        drawing(line, **options)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "line, expected",
    [
        ("", Drawing()),
        ("a b --layers 2", Drawing(files=("a", "b"), layers=2)),
        ("--layers=2 a", Drawing(files=("a",), layers=2)),
        ("--size 8 5 a", Drawing(files=("a",), size=(8, 5))),
        ("--weights 1 -2.5 1e-4", Drawing(weights=(1.0, -2.5, 1e-4))),
        ("--weights", Drawing(weights=())),
        ("--title None", Drawing(title=None)),
        ("--title=--layers", Drawing(title="--layers")),
        ("--title=a_b", Drawing(title="a_b")),
        ("--radius -4", Drawing(shape=Circle(radius=-4))),
        ("--no-filled", Drawing(shape=Circle(filled=False))),
        ("--filled", Drawing()),
    ],
)
def test_values(line: str, expected: Drawing):
    assert drawing(line) == expected


@pytest.mark.parametrize(
    "line, message",
    [
        ("--radius x", "--radius is 'x', expected a whole number"),
        ("--radius 2.5", "--radius is '2.5', expected a whole number"),
        ("--radius True", "--radius is 'True', expected a whole number"),
        ("--radius", "argument --radius: expected one argument"),
        ("--size 8", "argument --size: expected 2 arguments"),
        ("--size 8 x", "--size is 'x', expected a whole number"),
        ("--weights 1 x", "--weights is 'x', expected a number"),
        ("--layers 3", "--layers is '3', expected one of 1, 2"),
        ("--shape square --colour gren", "--colour is 'gren' (did you mean 'green'?), expected one of red, green"),
        ("--radios 2", "unknown argument '--radios' (did you mean '--radius'?)"),
        ("--radios=2", "unknown argument '--radios' (did you mean '--radius'?)"),
        ("--shap circle", "unknown argument '--shap' (did you mean '--shape'?)"),
        ("--xylophone", "unknown argument '--xylophone'"),
        ("a --layers 1 b", "unknown argument 'b'"),
        ("--filled=yes", "argument --filled: ignored explicit argument 'yes'"),
        # a flag of settings that are not chosen
        ("--side 2", "unknown argument '--side' (did you mean '--size'?)"),
        ("--shape sqare", "shape is 'sqare' (did you mean 'square'?), expected one of circle, square"),
        ("--shape circle --shape square", "--shape is given twice, expected once"),
        ("--config none.yaml", "config file none.yaml does not exist"),
    ],
)
def test_a_mistake_is_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(InputError) as error:
        drawing(line)
    assert str(error.value) == message
    assert capsys.readouterr() == ("", "")


def test_a_flag_chooses_the_settings_and_keeps_those_that_are_right():
    assert drawing("--shape square --side 1").shape == Square(side=1.0)
    own = {"default": Drawing(shape=Circle(radius=9))}
    assert drawing("--shape circle --no-filled", **own).shape == Circle(radius=9, filled=False)
    assert drawing("--shape square", **own).shape == Square()

    # settings of the chosen name, not of a class derived from it
    @dataclass(frozen=True)
    class Ring(Circle):
        width: int = 1

    assert type(drawing("--shape circle", default=Drawing(shape=Ring())).shape) is Circle


def test_the_settings_of_a_preset_decide_the_flags():
    presets = {"round": Drawing(), "angular": Drawing(shape=Square(side=5.0), layers=2)}
    assert drawing("--preset angular --colour green", presets=presets).shape == Square(5.0, "green")
    assert drawing("--radius 1", presets=presets).shape == Circle(1)
    with pytest.raises(InputError, match="^unknown argument '--radius'"):
        drawing("--preset angular --radius 1", presets=presets)
    with pytest.raises(
        InputError, match=r"^preset is 'rond' \(did you mean 'round'\?\), expected one of round, angular$"
    ):
        drawing("--preset rond", presets=presets)


def test_a_file_chooses_by_name_and_a_flag_wins(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("shape: {name: square, side: 4}\nlayers: 2")
    (tmp_path / "b.yaml").write_text("shape: {radius: 7}")
    (tmp_path / "c.yaml").write_text("shape: {name: sqare}")
    a, b, c = (f"--config {tmp_path / name}.yaml" for name in "abc")
    assert drawing(a) == Drawing(shape=Square(side=4.0), layers=2)
    assert drawing(f"{a} --side 1").shape == Square(side=1.0)
    assert drawing(f"{a} --shape circle --radius 1") == Drawing(shape=Circle(1), layers=2)
    # the flag is known when the file is read
    assert drawing(f"{b} --shape circle", presets={"angular": Drawing(shape=Square())}).shape == Circle(7)
    with pytest.raises(InputError, match="b.yaml: unknown key 'radius'"):
        drawing(f"{b} --shape square")
    with pytest.raises(
        InputError, match=r"c.yaml: shape: name is 'sqare' \(did you mean 'square'\?\), expected one of"
    ):
        drawing(c)


def test_what_is_printed_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = shown("--shape square --colour green --size 3 4 --print-config", capsys)
    assert "shape:\n  name: square\n  side: 2.0\n" in text
    (tmp_path / "a.yaml").write_text(text)
    assert drawing(f"--config {tmp_path / 'a.yaml'}") == Drawing(shape=Square(colour="green"), size=(3, 4))


def test_help_lists_the_flags_of_the_chosen_settings(capsys: pytest.CaptureFixture[str]):
    presets = {"round": Drawing(), "angular": Drawing(shape=Square(), layers=2)}
    text = " ".join(shown("--preset angular --help", capsys, presets=presets).split())
    for flag in ("FILE", "--layers {1,2}", "--side FLOAT", "--colour {red,green}", "--config FILE", "--print-config"):
        assert flag in text
    assert "--radius" not in text
    assert "--shape {circle,square}" in text and "(default: square)" in text
    assert "--preset {round,angular}" in text and "(default: angular)" in text
    other = shown("--preset angular --shape circle --help", capsys, presets=presets)
    assert "--radius INT" in other and "--side" not in other and "(default: circle)" in other


def test_every_flag_of_a_command_stands_in_its_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(TrainConfig, prog="avfast train", argv=["--help"], presets=PRESETS)
    text = capsys.readouterr().out
    for flag in ("--stage", "--clip-frames", "--unet-width", "--no-deterministic", "--preset"):
        assert flag in text


def recipes(config: Drawing) -> dict[str, dict[str, Any]]:
    return {"large": {"layers": 2, "radius": 9, "side": 9.0}, "plain": {"layers": 1, "title": None}}


def test_a_recipe_sets_fields_over_presets_and_files_and_under_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    presets = {"round": Drawing(title="one"), "angular": Drawing(shape=Square(), layers=2)}
    (tmp_path / "a.yaml").write_text("layers: 1\nweights: [1]\n")

    def found(line: str) -> Drawing:
        return drawing(line, presets=presets, recipes=recipes)

    assert found("--recipe large") == Drawing(shape=Circle(9), layers=2, title="one")
    large = found(f"--recipe large --preset angular --config {tmp_path / 'a.yaml'} --colour green")
    assert large == Drawing(shape=Square(9.0, "green"), layers=2, weights=(1.0,))
    assert found("--recipe large --layers 2 --size 3 4").size == (3, 4)
    for line, message in (
        ("--recipe large --layers 1", "--layers is 1, but --recipe large has 2: leave one of them out"),
        ("--radius 2 --recipe large", "--radius is 2, but --recipe large has 9: leave one of them out"),
        ("--recipe plain --title x", "--title is x, but --recipe plain has None: leave one of them out"),
        ("--recipe lage", "recipe is 'lage' (did you mean 'large'?), expected one of large, plain"),
        ("--recipe large --recipe large", "--recipe is given twice, expected once"),
    ):
        with pytest.raises(InputError) as error:
            found(line)
        assert str(error.value) == message
    text = " ".join(shown("--help", capsys, presets=presets, recipes=recipes).split())
    assert "--recipe {None,large,plain}" in text
    with pytest.raises(InputError, match="^recipe is 'large', but what is chosen has no recipes$"):
        drawing("--recipe large", presets=presets, recipes=lambda config: {})
    with pytest.raises(InputError, match="unknown argument '--recipe'"):
        drawing("--recipe large", presets=presets)


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_a_field_that_clashes_with_another_flag(argv: list[str]):
    @dataclass(frozen=True)
    class Layered:
        layers: int = 1

    @dataclass(frozen=True)
    class Configured:
        print_config: bool = True

    for shape, message in (
        (Layered(), "--layers is two flags: rename the field layers of Layered"),
        (Configured(), "--print-config is two flags: rename the field print_config of Configured"),
    ):
        with pytest.raises(InputError) as error:
            parse(Drawing, prog="draw", argv=argv, default=Drawing(shape=shape))
        assert str(error.value) == message


@pytest.mark.parametrize(
    "line, message",
    [
        ("--seed 1 --seed 2", "--seed is given twice, expected once"),
        ("--seed 1 --seed=1", "--seed is given twice, expected once"),
        ("--batch-size 3 --batch_size 4", "--batch-size is given twice, expected once"),
        ("--block --no-block", "--no-block is given twice, as --block before, expected once"),
        ("--no_block --no-block", "--no-block is given twice, expected once"),
        ("--preset demo --seed 1 --preset mmnist", "--preset is given twice, expected once"),
        ("--audio-shape 2 3 --audio-shape 2 3", "--audio-shape is given twice, expected once with all its values"),
        # what else is wrong is said first
        ("--sed 1 --sed 2", "unknown argument '--sed' (did you mean '--seed'?)"),
    ],
)
def test_a_flag_given_twice_is_refused(line: str, message: str):
    with pytest.raises(InputError) as error:
        parse(TrainConfig, prog="avfast train", argv=line.split(), presets=PRESETS)
    assert str(error.value) == message


def test_several_checkpoints_stand_behind_one_flag():
    kind = EvaluateConfig
    assert parse(kind, prog="", argv=["--checkpoint", "a", "b"]).checkpoint == ("a", "b")
    with pytest.raises(InputError, match="^--checkpoint is given twice, expected once with all its values$"):
        parse(kind, prog="", argv=["--checkpoint", "a", "--clips", "3", "--checkpoint", "b"])


def test_what_looks_like_a_second_flag_is_none(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("seed: 1")
    (tmp_path / "b.yaml").write_text("seed: 2\nname: b")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    config = parse(TrainConfig, prog="", argv=[*files, "--name=--seed", "--seed", "3", "--data-cache", "seed"])
    assert (config.seed, config.name, config.data_cache) == (3, "--seed", "seed")
