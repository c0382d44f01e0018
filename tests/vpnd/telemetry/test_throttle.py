from vpnd.telemetry.throttle import Throttle


def test_a_burst_passes_then_a_rate_and_the_rest_is_counted() -> None:
    throttle = Throttle(3, 1.0)
    assert [throttle.admit(100.0) for _ in range(5)] == [0, 0, 0, None, None]
    assert throttle.admit(101.0) == 2
    assert throttle.admit(101.5) is None
    assert throttle.admit(102.0) == 1
    assert [throttle.admit(200.0) for _ in range(4)] == [0, 0, 0, None]
