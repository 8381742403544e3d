"""What a DeepSpeed configuration may say: each refusal is one message, before a process starts."""

import json

import pytest
from pydantic import BaseModel

from xdscale.ds_config import read_ds_config
from xdscale.ds_sections import REFUSED, DSConfig, check_sections
from xdscale.errors import XdscaleError

BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}


def zero(stage=2, **values):
    return {"zero_optimization": {"stage": stage} | values}


def fp16(**values):
    return zero() | {"fp16": {"enabled": True} | values}


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


HOST = {"device": "cpu"}
CONTRADICTIONS = {
    "two precisions": (BF16 | FP16, "bf16 and fp16 are both enabled"),
    "stage 0 in fp16": (FP16, "stage = 0 with fp16: .* expected stage 1, 2 or 3"),
    "sums under stage 0": (
        BF16 | {"data_types": {"grad_accum_dtype": "fp32"}},
        r"ds\.json: data_types\.grad_accum_dtype = 'fp32': .*stage 0 .* here bf16; leave it out, or take stage 1",
    ),
    "fp32 sums under stage 0": ({"data_types": {"grad_accum_dtype": "bf16"}}, "here fp32; leave it out"),
    "parameters of stage 2": (
        zero(offload_param=HOST),
        r"zero_optimization\.offload_param is for stage 3, not 2: leave",
    ),
    "optimizer of stage 0": (
        zero(0, offload_optimizer=HOST),
        "offload_optimizer is for stage 1, 2, 3, not 0: leave it",
    ),
    "prescaled": (zero() | {"prescale_gradients": True}, "prescale_gradients = True: .*reduce_scatter: false"),
    "predivided": (zero(2) | {"gradient_predivide_factor": 2}, "gradient_predivide_factor = 2.0: expected 1 where"),
    "halved": (zero(3, reduce_scatter=False) | {"gradient_predivide_factor": 2}, "= 2.0: expected 1 .* in stage 3"),
    "old beside new": (
        zero(2, offload_optimizer=HOST, cpu_offload=False),
        r"zero_optimization\.cpu_offload = False: DeepSpeed does not take it beside offload_optimizer; leave it out",
    ),
    "old beside new of weights": (
        zero(3, stage3_gather_fp16_weights_on_model_save=False, stage3_gather_16bit_weights_on_model_save=True),
        r"_fp16_weights_on_model_save = False: DeepSpeed does not take it beside stage3_gather_16bit_weights_on_m",
    ),
    "high least scale": (fp16(min_loss_scale=2**17), "min_loss_scale = 131072: expected at most the first .*= 65536"),
}
VALUES = [
    ({"fp16": {"enabled": "true"}}, r"fp16\.enabled = 'true': Input should be a valid boolean"),
    ({"bf16": True}, "bf16 = True: expected a JSON object"),
    ({"zero_optimization": None}, "zero_optimization = None: expected a JSON object"),
    (zero("2"), r"zero_optimization\.stage = '2': expected 0, 1, 2 or 3"),
    (zero(True), r"zero_optimization\.stage = True: expected 0, 1, 2 or 3"),
    (zero(2.0), r"zero_optimization\.stage = 2\.0: expected 0, 1, 2 or 3"),
    (zero(4), r"zero_optimization\.stage = 4: expected 0, 1, 2 or 3"),
    (zero(offload_optimizer="cpu"), r"zero_optimization\.offload_optimizer = 'cpu': expected a JSON object"),
    (
        zero(offload_optimizer={"device": "nvme"}),
        r"offload_optimizer\.device = 'nvme': Input should be 'none' or 'cpu'",
    ),
    (zero(overlap_comm="yes"), r"overlap_comm = 'yes': Input should be a valid boolean"),
    (zero(reduce_bucket_size="auto"), r"reduce_bucket_size = 'auto': expected a number"),
    (zero(reduce_bucket_size=0), r"reduce_bucket_size = 0: Input should be greater than or equal to 1"),
    (zero(allgather_bucket_size=5), r"allgather_bucket_size = 5: Input should be a multiple of 2"),
    (zero(stge=2), r"unknown key 'zero_optimization\.stge'; did you mean 'stage'"),
    (fp16(enable=True), r"unknown key 'fp16\.enable'; did you mean 'enabled'"),
    (fp16(initial_scale_power=63), r"initial_scale_power = 63: Input should be less than or equal to 32"),
    (fp16(loss_scale=1e30), r"loss_scale = 1e\+30: Input should be less than or equal to"),
    (fp16(hysteresis=0), r"hysteresis = 0: Input should be greater than or equal to 1"),
    (
        {"data_types": {"grad_accum_dtype": "half"}},
        r"grad_accum_dtype = 'half': Input should be 'fp32', 'bf16' or 'fp16'",
    ),
    ({"data_types": {"grad_acum_dtype": "fp32"}}, r"'data_types\.grad_acum_dtype'; did you mean 'grad_accum_dtype'"),
    ({"communication_data_type": "float"}, "communication_data_type = 'float': Input should be 'fp32', 'bf16' or"),
    ({"gradient_predivide_factor": 0}, "gradient_predivide_factor = 0: Input should be greater than 0"),
    ({"gradient_predivide_factor": "2"}, "gradient_predivide_factor = '2': expected a number"),
    ({"wall_clock_breakdown": None}, "wall_clock_breakdown = None: Input should be a valid boolean"),
    ({"steps_per_print": 0}, r"steps_per_print = 0: Input should be greater than or equal to 1"),
    ({"zero_optimisation": {"stage": 2}}, "unknown key 'zero_optimisation'; did you mean 'zero_optimization'"),
    ({"nebula": {}}, "unknown key 'nebula'"),
]


@pytest.fixture
def read(tmp_path):
    def read(values):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(values))
        return read_ds_config(str(path))

    return read


@pytest.mark.parametrize(("values", "message"), [*CONTRADICTIONS.values(), *VALUES])
def test_what_deepspeed_would_end_at_in_the_ranks_or_pass_over_is_refused(read, values, message):
    with pytest.raises(XdscaleError, match=message) as refusal:
        read(values)
    assert "ds.json: " in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_only_has_its_default_is_refused_with_another_value(read, key):
    """With its default it may stand there, as in files that people bring along."""
    default, why = REFUSED[key]
    assert read(nested(key, default)) == nested(key, default)
    other = {False: True, True: False}.get(default, 7) if isinstance(default, bool) else 7
    with pytest.raises(XdscaleError) as refusal:
        read(nested(key, other))
    assert f"ds.json: {key} = {other!r}: expected {json.dumps(default)}: {why}; leave it out" in str(refusal.value)


@pytest.mark.parametrize(
    "values",
    [
        BF16 | {"data_types": {"grad_accum_dtype": "bf16"}},
        {"data_types": {"grad_accum_dtype": None}},
        fp16(loss_scale=0, loss_scale_window=1000, initial_scale_power=16, hysteresis=2, min_loss_scale=1),
        fp16(loss_scale=128.0, min_loss_scale=2**20),
        zero(2, offload_param={"device": "none"}, offload_optimizer=None, overlap_comm=None),
        zero(3, offload_param=HOST | {"pin_memory": False}, offload_optimizer=HOST),
        zero(2, reduce_bucket_size=5e8, allgather_bucket_size=2e8),
        zero(2, reduce_scatter=False) | {"prescale_gradients": True, "gradient_predivide_factor": 2},
        zero(1) | {"prescale_gradients": True},
        {"comms_logger": {"enabled": True, "verbose": True, "prof_all": False, "prof_ops": ["all_reduce"]}},
    ],
)
def test_what_goes_together_passes_as_it_stands(read, values):
    assert read(values) == values


def test_every_key_of_deepspeeds_own_classes_is_taken_with_its_default_or_refused():
    """So that none is new, gone or of another default in another release of DeepSpeed; null, too, where it is that."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    classes = {
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    }
    assert {key.rpartition(".")[0] for key in REFUSED} <= {"", *classes}
    for section, theirs in classes.items():
        ours = DSConfig
        for part in section.split("."):
            annotation = ours.model_fields[part].annotation
            ours = getattr(annotation, "__args__", (annotation,))[0]  # of "Offload | None"
        defaults = {name: field.default for name, field in ours.model_fields.items()}
        refused = {
            key.rpartition(".")[2]: value[0] for key, value in REFUSED.items() if key.rpartition(".")[0] == section
        }
        given = {field.alias or name: field for name, field in theirs.model_fields.items()}
        assert defaults.keys() | refused.keys() == given.keys()
        for name, field in given.items():
            wanted = (defaults | refused)[name]
            found = field.get_default(call_default_factory=True)
            found = found.value if hasattr(found, "value") else found
            assert wanted == found or (found is None and wanted is False) or isinstance(found, BaseModel), name
            if found is None:
                check_sections("ds.json", nested(f"{section}.{name}", None))
