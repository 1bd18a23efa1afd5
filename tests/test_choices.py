"""The study `recipe`: choices in a YAML file, compared on held-out training images."""

import pytest
import yaml
from recipes import best, checkpoints, interrupted_at, rows, write_recipe

from biper.commands.ablation import main as ablation_main
from biper.data import digits
from biper.errors import UsageError
from biper.experiments.choices import recipe_choices
from biper.experiments.recipe import read_recipe
from biper.training.settings import make_settings

CHOICES = {
    "smoothed, 0.1": {"both": {"label_smoothing": 0.1}},
    "slow end": {"stage2": {"lr": 0.001}},
    "freq 10": {"both": {"freq": 10}},
    "2 : 4": {"stage1": {"epochs": 2}, "stage2": {"epochs": 4}},
}


def write_choices(folder, choices=CHOICES):
    path = folder / "choices.yaml"
    path.write_text(choices if isinstance(choices, str) else yaml.safe_dump(choices, sort_keys=False))
    return path


def test_choices_change_the_stages_that_they_name(tmp_path):
    recipe = read_recipe(write_recipe(tmp_path), {"validation": 200})
    study = recipe_choices(recipe, write_choices(tmp_path))
    assert [variant.title for variant in study.variants] == ["recipe", *CHOICES]
    assert study.base == "recipe"
    seen = {}
    for variant in study.variants:
        stages = [make_settings("cifar10", s, settings) for s, (_, settings) in variant.stages.items()]
        keys = [key for key, _ in variant.stages.values()]
        seen[variant.title] = keys, *[(c.label_smoothing, c.lr, c.epochs) for c in stages], stages[0].freq
    assert seen == {
        "recipe": (["freq_20", "freq_20"], (0.0, 0.05, 4), (0.0, 0.01, 2), 20.0),
        "smoothed, 0.1": (["choice_smoothed_0.1"] * 2, (0.1, 0.05, 4), (0.1, 0.01, 2), 20.0),
        "slow end": (["freq_20", "stage2_choice_slow_end"], (0.0, 0.05, 4), (0.0, 0.001, 2), 20.0),
        "freq 10": (["choice_freq_10"] * 2, (0.0, 0.05, 4), (0.0, 0.01, 2), 10.0),
        "2 : 4": (["choice_2_4"] * 2, (0.0, 0.05, 2), (0.0, 0.01, 4), 20.0),
    }
    assert study.variants[4].stages[1][1]["warm_up_epochs"] == 2  # of 4, in half the epochs


def test_they_are_measured_on_held_out_images_resumed_and_added_to(command, refused, monkeypatch, tmp_path):
    def read(train, size):
        assert train  # no test image is read
        return original(train, size)

    original = digits.read_digits
    monkeypatch.setattr(digits, "read_digits", read)
    out, path = tmp_path / "out", write_recipe(tmp_path, {"epochs": 1}, epochs=1, warm_up=False)
    slow, fast = {"slow end": CHOICES["slow end"]}, {"fast end": {"stage2": {"lr": 0.1}}}
    flags = [path, "--choices", write_choices(tmp_path, slow), "--validation", 200, "--results_dir", out]
    with interrupted_at("recipe: slow end, seed 0"):
        assert command(*flags, entry=ablation_main)[0] == 130
    there = checkpoints(out)
    assert command(*flags, entry=ablation_main)[0] == 0
    write_choices(tmp_path, slow | fast)
    code, _, err = command(*flags, "--seeds", 1, entry=ablation_main)
    assert code == 0, err
    assert there.items() <= checkpoints(out).items()  # what was finished is not trained again
    metrics, table = rows(out / "metrics.csv"), rows(out / "recipe.csv")
    seeds = {"recipe": [0, 1], "slow end": [0, 1], "fast end": [1]}  # none is lost
    for variant, run in {"recipe": "freq_20", "slow end": "stage2_choice_slow_end"}.items():
        (row,) = (r for r in table if (r["variant"], r["stage"], r["quantity"]) == (variant, "2", "top-1 (%)"))
        assert float(row["seed_0"]) == best(metrics, run=run, seed=0, stage=2)
        assert float(row["seed_1"]) == best(metrics, run=run, seed=1, stage=2)
    assert {(r["variant"], int(r["n"])) for r in table} == {(name, len(of)) for name, of in seeds.items()}
    text = (out / "recipe.md").read_text()
    assert "    lr: 0.001" in text  # what was chosen from
    assert "**Measured on 200 training images that were held out**" in text
    assert "--choices choices.yaml --validation 200" in text
    write_choices(tmp_path, {"other": CHOICES["slow end"]})
    assert "recipe.csv has fast end, slow end, which nothing registers or names" in refused(*flags, entry=ablation_main)
    write_choices(tmp_path, {"slow end": {"stage2": {"lr": 0.002}}} | fast)
    assert "lr: 0.002 (there 0.001)" in refused(*flags, entry=ablation_main)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("b: 1\na: [c\nd: {\n", "is no valid YAML in line 3, column 2: expected ',' or ']', but got ':'"),
        ("a: 2024-13-45", "is no valid YAML"),
        ("a: {both: {lr: 1}}\na: {both: {lr: 2}}", "'a' is there twice"),
        ("off: {both: {lr: 1}}", "the name False is no text of one line: put it in quotes"),
        ({"a": {"both": {"model": "resnet99_1w1a"}}}, "a: unknown model"),
        ({"a": {"both": {"model": "resnet20_32w32a"}}}, "a: resnet20_32w32a has no weights to binarize"),
        ({"a": {"both": {"quantizer": "colour"}}}, "a: "),
        ({"a": {"both": {"quantizer": "sign"}}}, "a: "),
        ({"a": {"both": {"teacher": "none.pth.tar"}}}, "a: no checkpoint at none.pth.tar"),
        ("", "expected the choices by name"),
        ({"a": 3}, "a: expected the sections both, stage1, stage2"),
        ({"a": {"stage3": {"lr": 1}}}, "a: expected the sections both, stage1, stage2"),
        ({"a": {"both": {"colour": 1}}}, "a: unknown key 'colour' in both"),
        ({"a": {"both": {"lr": -1}}}, "--lr -1"),
        ({"a": {"both": {"lr": "x"}}}, "a: "),
        ({"a": {"both": None}}, "a: section both has no settings"),
        ({"a": {"both": {}}}, "a: it changes nothing"),
        ({"a" * 201: {"both": {"lr": 1}}}, "is too long: 200 bytes at most"),
        ({"a": {"both": {"seed": 1}}}, "a: seed is no choice of a recipe"),
        ({"a": {"both": {"device": "cpu"}}}, "a: device is no choice of a recipe"),
        ({"a": {"stage2": {"freq": 10}}}, "a: stage 2 takes freq from stage 1"),
        ({"a b": {"both": {"lr": 1}}, "a_b": {"both": {"lr": 2}}}, "the name 'a_b' is that of 'a b'"),
        ({"recipe": {"both": {"lr": 1}}}, "the name 'recipe' is that of 'the recipe'"),
    ],
)
def test_bad_choices(tmp_path, choices, message):
    recipe = read_recipe(write_recipe(tmp_path), {"validation": 200})
    with pytest.raises(UsageError) as error:
        recipe_choices(recipe, write_choices(tmp_path, choices))
    assert message in str(error.value)
    assert "choices.yaml" in str(error.value)


def test_bad_flags(refused, tmp_path):
    path, choices = write_recipe(tmp_path), write_choices(tmp_path)
    cases = {
        "give --validation N": ["--choices", choices],
        "give --choices FILE.yaml": ["--studies", "recipe", "--validation", 200],
        "add it to --studies": ["--studies", "frequency", "--choices", choices],
        "cannot read": ["--choices", tmp_path / "none.yaml", "--validation", 200],
    }
    for message, argv in cases.items():
        assert message in refused(path, *argv, "--results_dir", tmp_path / "out", entry=ablation_main)
    assert not (tmp_path / "out").exists()
