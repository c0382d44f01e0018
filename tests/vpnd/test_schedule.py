import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from vpnd.schedule import Deadlines

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 8), st.one_of(st.none(), st.integers(0, 50))),
        st.tuples(st.just("due"), st.integers(0, 60), st.none()),
    ),
    max_size=200,
)


@settings(max_examples=100)
@given(OPERATIONS)
def test_deadlines_match_a_plain_dictionary(operations: list[tuple[str, int, int | None]]) -> None:
    deadlines: Deadlines[int] = Deadlines()
    model: dict[int, int] = {}
    for kind, number, value in operations:
        if kind == "set":
            deadlines.set(number, value)
            if value is None:
                model.pop(number, None)
            else:
                model[number] = value
        else:
            taken = deadlines.due(number)
            if taken is None:
                assert all(when > number for when in model.values())
            else:
                assert model[taken] == min(model.values()) <= number
                del model[taken]
        assert len(deadlines) == len(model)
        assert deadlines.next() == (min(model.values()) if model else None)


def test_many_changes_of_one_key_do_not_grow_the_heap() -> None:
    deadlines: Deadlines[str] = Deadlines()
    tracemalloc.start()
    try:
        for turn in range(20_000):
            deadlines.set("only", float(turn))
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown < 200_000  # octets; 20,000 entries take some 3 million
    assert deadlines.next() == 19_999.0
