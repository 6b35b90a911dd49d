import dataclasses
import json
import pickle
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.kernels.values import Protected
from vllm_heterocache.policies import RECIPES, make_policy
from vllm_heterocache.refusal import Refusal


def parse(**options) -> HeteroCacheConfig:
    return HeteroCacheConfig.from_additional_config({"heterocache": options})


@pytest.mark.parametrize("nothing", [None, {}, {"heterocache": {}}, {"other_plugin": {"a": 1}}])
def test_defaults_without_options(nothing):
    assert HeteroCacheConfig.from_additional_config(nothing) == HeteroCacheConfig()


def test_options_are_taken_over():
    config = parse(gpu_budget=0.2, recipe="paper", cpu_pool_gib=3, sink_pages=0, drift_interval=3)
    assert (config.gpu_budget, config.recipe, config.cpu_pool_gib) == (0.2, "paper", 3.0)
    assert (config.sink_pages, config.drift_interval) == (0, 3)
    assert config.recent_pages == HeteroCacheConfig().recent_pages


def test_round_trip_through_json():
    config = HeteroCacheConfig(
        gpu_budget=0.25,
        policy="snapkv",
        policy_options={"window": 16, "group": "max"},
        cpu_pool_gib=1 / 3,
    )
    additional = json.loads(json.dumps({"heterocache": dataclasses.asdict(config)}))
    assert HeteroCacheConfig.from_additional_config(additional) == config
    # other plugins' sections do not matter
    assert HeteroCacheConfig.from_additional_config({"else": 1, **additional}) == config


def test_it_is_frozen_and_hashable():
    config = HeteroCacheConfig(policy_options={"a": [1]})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.gpu_budget = 0.5
    assert hash(config) == hash(HeteroCacheConfig(policy_options={"a": [2]}))


def test_whole_numbers_are_taken_for_fractions():
    assert isinstance(parse(gpu_budget=1).gpu_budget, float)
    assert parse(gpu_budget=1).keeps_everything
    assert not parse(gpu_budget=0.999).keeps_everything


def test_min_pages_has_room_for_one_selected_page():
    assert parse(sink_pages=2, recent_pages=5).min_pages == 8
    assert parse(sink_pages=0, recent_pages=0).min_pages == 1
    assert parse(sink_pages=2**20, recent_pages=2**20).min_pages == 2**21 + 1


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("gpu_budgt", "gpu_budget"),
        ("gpu-budget", "gpu_budget"),
        ("budget", "gpu_budget"),
        ("min_prompt", "min_prompt_tokens"),
        ("drift_treshold", "drift_threshold"),
        ("cpu_pool_gb", "cpu_pool_gib"),
    ],
)
def test_unknown_key_names_the_nearest_known_one(key, nearest):
    with pytest.raises(ValueError, match=f"option {key}=1 .*did you mean '{nearest}'"):
        parse(**{key: 1})


def test_unknown_key_unlike_any_other_lists_the_known_ones():
    with pytest.raises(ValueError, match="zzz") as error:
        parse(zzz=1)
    assert "did you mean" not in str(error.value)
    assert "gpu_budget" in str(error.value) and "recipe" in str(error.value)


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "option",
    [
        {"gpu_budget": "x" * 5000},
        {"gpu_budget": 10**400},
        {"policy": "x" * 5000},
        {"recipe": nested(20_000)},
        {"policy_options": {"x" * 5000: 1}},
        {"x" * 5000: 1},
    ],
    ids=lambda option: str(next(iter(option)))[:20],
)
def test_a_refusal_stays_short_whatever_it_names(option):
    with pytest.raises(ValueError, match="is refused") as refusal:
        make_policy(parse(**option))
    assert len(str(refusal.value)) < 700
    assert str(next(iter(option)))[:20] in str(refusal.value)


@pytest.mark.parametrize("name", ["compact_min_tokens", "workers_per_host", "recomputed_tokens"])
def test_what_start_up_decides_is_no_option(name):
    with pytest.raises(ValueError, match=f"option {name}=7 .*there is no such option"):
        parse(**{name: 7})


@pytest.mark.parametrize("section", ["hetero_cache", "HeteroCache", "heterocahe", "hetero-cache"])
def test_misspelt_section_is_not_ignored(section):
    with pytest.raises(ValueError, match="rename it to 'heterocache'"):
        HeteroCacheConfig.from_additional_config({section: {"gpu_budget": 0.5}})
    with pytest.raises(ValueError, match="rename it to 'heterocache'"):
        HeteroCacheConfig.from_additional_config({"heterocache": {}, section: {"gpu_budget": 0.5}})


@pytest.mark.parametrize(
    ("outside", "option"),
    [
        ({"gpu_budget": 0.1}, "gpu_budget"),
        ({"gpu-budget": 0.1}, "gpu_budget"),
        ({"policy": "snapkv"}, "policy"),
        ({"drift_treshold": 0}, "drift_threshold"),
        ({"heterocache": {"gpu_budget": 0.5}, "cpu_pool_gib": 3}, "cpu_pool_gib"),
    ],
    ids=str,
)
def test_option_outside_the_section_is_not_ignored(outside, option):
    key = list(outside)[-1]
    words = f'option {key}=.* is refused: .*\'heterocache\'; write {{"heterocache": {{"{option}"'
    with pytest.raises(ValueError, match=words):
        HeteroCacheConfig.from_additional_config(outside)


def test_what_vllm_itself_puts_beside_the_section_is_no_option():
    beside = {"gdn_prefill_backend": "auto", "kda_decode_backend": "auto"}
    assert HeteroCacheConfig.from_additional_config(beside) == HeteroCacheConfig()


BAD_VALUES = [
    ("gpu_budget", 0),
    ("gpu_budget", -0.1),
    ("gpu_budget", 1.01),
    ("gpu_budget", float("nan")),
    ("gpu_budget", "0.3"),
    ("gpu_budget", True),
    ("gpu_budget", None),
    ("full_share", 1),
    ("full_share", -0.5),
    ("full_share", [0.5]),
    ("min_prompt_tokens", 0),
    ("min_prompt_tokens", 10.5),
    ("min_prompt_tokens", "1024"),
    ("drift_threshold", 1.5),
    ("drift_threshold", -0.01),
    ("drift_interval", 0),
    ("drift_interval", False),
    ("sink_pages", -1),
    ("sink_pages", 2**20 + 1),
    ("sink_pages", 2**31),
    ("recent_pages", -3),
    ("recent_pages", 2**20 + 1),
    ("recent_pages", 10**9),
    ("recent_pages", 10**400),
    ("recent_pages", 1.0),
    ("recent_pages", float("inf")),
    ("stability_threshold", 2),
    ("similarity_threshold", "high"),
    ("cpu_pool_gib", 0),
    ("cpu_pool_gib", -4),
    ("cpu_pool_gib", "8GiB"),
    ("cpu_pool_gib", True),
    ("cpu_pool_gib", float("inf")),
    ("cpu_pool_gib", 1e300),
    ("cpu_pool_gib", 10**400),
    ("policy", ["snapkv"]),
    ("policy", None),
    ("policy_options", "window=32"),
    ("policy_options", [["window", 32]]),
    ("policy_options", {3: 1}),
    ("policy_options", {"window": 32, None: 1}),
    ("profile", ""),
    ("profile", None),
    ("profile", 7),
    ("recipe", "papre"),
    ("recipe", 3),
    ("recipe", ["paper"]),
    ("debug_poison", 1),
    ("debug_poison", "true"),
    ("debug_poison", None),
    ("evicted_means", 1),
    ("evicted_means", "true"),
    ("even_budgets", 1),
    ("even_budgets", None),
]


@pytest.mark.parametrize(
    ("options", "keeps_means", "share_of_matched"),
    [
        ({}, False, 0.5),
        ({"matched_share": 0}, True, 0),
        ({"matched_share": 0.25}, False, 0.25),
        ({"evicted_means": True}, True, 0),
        ({"evicted_means": False}, False, 0),
        ({"evicted_means": False, "matched_share": 0.25}, False, 0.25),
        ({"gpu_budget": 1.0, "matched_share": 0.25}, True, 0),
        ({"recipe": "paper"}, False, 0),
        ({"recipe": "paper", "evicted_means": True}, True, 0),
        ({"recipe": "paper", "matched_share": 0.25}, False, 0.25),
        ({"policy": "snapkv"}, False, 0),
        ({"policy": "snapkv", "evicted_means": True}, True, 0),
    ],
)
def test_what_evicted_tokens_leave_behind_is_the_recipes_own_unless_told_otherwise(
    options, keeps_means, share_of_matched
):
    config = parse(**options)
    assert config.keeps_means is keeps_means
    assert config.share_of_matched == share_of_matched


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, 0.045),
        ({"gpu_budget": 0.06}, 0.045),
        ({"gpu_budget": 0.05}, 0.09),
        ({"gpu_budget": 0.02}, 0.09),
        ({"gpu_budget": 0.02, "finder_share": 0.03}, 0.03),
        ({"gpu_budget": 0.02, "drift_threshold": 0}, 0.0),
        ({"gpu_budget": 0.02, "policy": "snapkv"}, 0.0),
        ({"gpu_budget": 0.3, "recipe": "paper"}, 0.0),
    ],
    ids=str,
)
def test_small_budgets_have_twice_the_finders(options, share):
    assert HeteroCacheConfig(**options).share_of_finders == share


@pytest.mark.parametrize(("option", "value"), BAD_VALUES, ids=lambda v: repr(v))
def test_bad_value_is_refused_in_one_sentence(option, value):
    with pytest.raises(ValueError, match=option) as error:
        parse(**{option: value})
    message = str(error.value)
    assert message.startswith(f"heterocache option {option}=")
    assert " is refused: " in message and "; " in message, "reason and fix"
    assert message.endswith(".") and "\n" not in message
    with pytest.raises(ValueError, match=" is refused: ") as direct:
        HeteroCacheConfig(**{option: value})
    assert str(direct.value) == message and type(direct.value) is Refusal
    with pytest.raises(ValueError, match=" is refused: ") as replaced:
        dataclasses.replace(HeteroCacheConfig(), **{option: value})
    assert str(replaced.value) == message


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        (
            "gpu_budget",
            2,
            "it is the fraction of a prompt's KV that stays on the GPU; "
            "choose a number above 0 and up to 1, such as 0.3",
        ),
        (
            "full_share",
            "0.5",
            "it must be a number, at least 0, below 1, not str; write it without quotes",
        ),
        (
            "gpu_budget",
            "25%",
            "it must be a number, above 0, at most 1, not str; "
            "choose a number above 0 and up to 1, such as 0.3",
        ),
        (
            "cpu_pool_gib",
            "auto",
            "it must be a number, above 0, at most 1,000,000, not str; choose a number of GiB "
            "above 0 and up to 1,000,000, or remove it for automatic sizing",
        ),
        (
            "drift_interval",
            "often",
            "it must be a whole number, at least 1, not str; choose another value or remove it",
        ),
        (
            "drift_interval",
            0,
            "it must be a whole number, at least 1; choose another value or remove it",
        ),
        (
            "recent_pages",
            10**9,
            "it counts pages of a prompt, and start-up plans for 1,048,576 at most; "
            "choose 0 to 1,048,576, or remove it for the default",
        ),
        (
            "sink_pages",
            "1",
            "it must be a whole number, at least 0, at most 1,048,576, not str; "
            "write it without quotes",
        ),
        ("drift_threshold", 1.5, "it is an overlap of two page sets; choose 0 to 1"),
        ("policy_options", {3: 1}, 'they are a JSON object; write {"window": 32}, or remove it'),
        (
            "recipe",
            "papre",
            "there is no such recipe (did you mean 'paper'?); choose one of retrieval, paper",
        ),
    ],
)
def test_sentence_says_what_is_wrong_and_what_to_write(option, value, sentence):
    with pytest.raises(ValueError, match=" is refused: ") as error:
        HeteroCacheConfig(**{option: value})
    assert str(error.value) == f"heterocache option {option}={value!r} is refused: {sentence}."


def test_a_refusal_keeps_its_parts_on_the_way_to_another_process():
    with pytest.raises(Refusal) as error:
        HeteroCacheConfig(drift_threshold=1.5)
    arrived = pickle.loads(pickle.dumps(error.value))
    assert arrived.sentence == (
        "heterocache option drift_threshold=1.5 is refused: it is an overlap of two page sets",
        "choose 0 to 1",
    )
    assert str(arrived) == str(error.value)


def test_unknown_option_is_refused_where_it_is_written_in_code():
    with pytest.raises(ValueError, match=r"option gpu_budgt=1 .*did you mean 'gpu_budget'"):
        HeteroCacheConfig(gpu_budgt=1)


def test_key_that_is_no_string_is_refused_as_unknown():
    with pytest.raises(ValueError, match="option 3=1 is refused: there is no such option"):
        HeteroCacheConfig.from_additional_config({"heterocache": {3: 1}})


def test_command_line_offers_every_recipe():
    assert get_args(get_type_hints(HeteroCacheConfig)["recipe"]) == RECIPES


def test_recipe_typo_is_recognised():
    with pytest.raises(ValueError, match="did you mean 'retrieval'"):
        parse(recipe="retreival")


@pytest.mark.parametrize("given", [["gpu_budget"], "gpu_budget=0.3", 0.3])
def test_something_else_than_an_object_is_refused(given):
    with pytest.raises(ValueError, match="JSON object"):
        HeteroCacheConfig.from_additional_config({"heterocache": given})
    with pytest.raises(ValueError, match="JSON object"):
        HeteroCacheConfig.from_additional_config(given)


@pytest.mark.parametrize("option", ["page_size", "debug_force_triggers"])
def test_options_that_went_are_refused_as_unknown(option):
    with pytest.raises(ValueError, match=f"{option}=16 is refused: there is no such option"):
        parse(**{option: 16})


def test_nothing_is_poisoned_unless_asked_for():
    assert parse().debug_poison is False
    config = parse(debug_poison=True)
    assert config.debug_poison is True
    additional = json.loads(json.dumps({"heterocache": dataclasses.asdict(config)}))
    assert HeteroCacheConfig.from_additional_config(additional) == config


def test_protected_pages_are_those_of_the_options():
    assert parse(sink_pages=2, recent_pages=5).protected == Protected(sinks=2, recent=5)
    assert parse(recent_pages=0).protected == Protected(sinks=1, recent=0)


def test_import_loads_neither_vllm_nor_torch():
    code = "import sys, vllm_heterocache.config; print({'vllm', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
