import numpy as np
import pytest

from pretrain.schedules import ScheduleConfig, linear_then_constant, scaled_lr, schedules

SHORT = ScheduleConfig(
    iterations=125_000,
    batch=2048,
    base_lr=4e-3,
    warmup=12_500,
    final_weight_decay=0.4,
    momentum=0.992,
)


@pytest.mark.parametrize("config", [ScheduleConfig(), SHORT], ids=["long", "short"])
def test_the_recipes_endpoints(config: ScheduleConfig) -> None:
    found = schedules(config)
    assert {len(values) for values in found} == {config.iterations}
    peak = scaled_lr(config.base_lr, config.batch)
    assert found.lr[0] == 0
    assert found.lr[config.warmup - 1] == found.lr[config.warmup] == pytest.approx(peak)
    assert found.lr.max() == pytest.approx(peak)
    assert found.lr[-1] == pytest.approx(1e-6, rel=1e-3)
    middle = (config.warmup + config.iterations) // 2
    assert found.lr[middle] == pytest.approx((peak + 1e-6) / 2)
    assert not found.last_layer_lr[:1250].any()
    assert np.array_equal(found.last_layer_lr[1250:], found.lr[1250:])
    assert found.weight_decay[0] == pytest.approx(0.04)
    assert found.weight_decay[-1] == pytest.approx(config.final_weight_decay)
    assert found.momentum[0] == pytest.approx(config.momentum)
    assert found.momentum[-1] == pytest.approx(1.0, abs=1e-9)
    temperature = found.teacher_temperature
    assert temperature[[0, 37_499, 37_500, -1]] == pytest.approx([0.04, 0.07, 0.07, 0.07])
    assert np.diff(temperature[:37_500]) == pytest.approx(0.03 / 37_499)


def test_the_scaled_learning_rates_of_the_recipes() -> None:
    assert scaled_lr(2e-4, 3072) == pytest.approx(3.4641e-4, rel=1e-4)
    assert scaled_lr(4e-3, 2048) == pytest.approx(5.6569e-3, rel=1e-4)


def test_a_run_shorter_than_its_warm_up_has_a_value_for_every_iteration() -> None:
    config = ScheduleConfig(iterations=7, warmup=100)
    found = schedules(config)
    assert {len(values) for values in found} == {7}
    assert all(np.isfinite(values).all() for values in found)
    assert linear_then_constant(0.0, 1.0, 3, 5).tolist() == [0.0, 0.25, 0.5]
