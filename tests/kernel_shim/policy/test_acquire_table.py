"""The acquire table: one question at a time, repeated while it lasts, answered or given up."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kernel_shim.model import Acquire, AcquireSequence, Action, AddressRange, Direction, Flow, Mode, Policy, PolicyIndex, ReqId, Selector, Template
from kernel_shim.policy import acquire as module
from kernel_shim.policy.acquire import AcquireState, AcquireTable, Due, Need
from kernel_shim.policy.peer import PeerKey, peer_of

TEMPLATE = Template(Mode.TUNNEL, ReqId(3), ip_address("192.0.2.1"), ip_address("192.0.2.2"))
OPEN = Template(Mode.TRANSPORT, ReqId(4))
SELECTOR = Selector(AddressRange.everything(4), AddressRange.everything(4))


def policy(number: int = 1, template: Template = TEMPLATE) -> Policy:
    return Policy(SELECTOR, Direction.OUT, Action.PROTECT, 0, (template,), index=PolicyIndex(number * 8 + 1))


def flow(number: int = 1) -> Flow:
    return Flow(ip_address("10.0.0.1"), ip_address("10.0.1.0") + number, 17, 1000, 2000)


def ask(table: AcquireTable, now: float, number: int = 1, of: Flow | None = None) -> tuple[Need, Acquire | None]:
    wanted = of or flow()
    return table.need(peer_of(policy(number), TEMPLATE, wanted), policy(number), TEMPLATE, wanted, now)


@pytest.fixture
def table() -> AcquireTable:
    table = AcquireTable()
    table.listening(True, 0.0)
    return table


KEY = peer_of(policy(), TEMPLATE, flow())


def test_an_acquire_carries_what_the_key_manager_needs(table: AcquireTable) -> None:
    need, acquire = ask(table, 0.0)
    assert need is Need.ASKED
    assert acquire == Acquire(AcquireSequence(1), policy().index, ReqId(3), Mode.TUNNEL, TEMPLATE.source, TEMPLATE.destination, SELECTOR, flow())
    assert table.peer(AcquireSequence(1)) == (KEY, flow())
    assert table.asked(KEY) == flow()
    table.failed(AcquireSequence(1), 1.0)
    assert table.asked(KEY) is None


def test_a_wildcard_policy_has_a_peer_for_each_host_pair(table: AcquireTable) -> None:
    wildcard = policy(1, OPEN)
    acquires = [table.need(peer_of(wildcard, OPEN, flow(n)), wildcard, OPEN, flow(n), 0.0)[1] for n in (1, 2, 1)]
    assert [a.destination if a else None for a in acquires] == [flow(1).destination, flow(2).destination, None]
    assert acquires[0] is not None
    assert acquires[0].source == flow().source


def test_while_one_is_outstanding_others_are_coalesced(table: AcquireTable) -> None:
    ask(table, 0.0)
    assert ask(table, 0.5, of=flow(2)) == (Need.WAITING, None)
    assert table.statistics()["acquire_coalesced"] == 1


def test_it_is_repeated_with_growing_pauses_under_its_number_until_it_times_out(table: AcquireTable) -> None:
    _, first = ask(table, 100.0)
    repeats = []
    while table.state(KEY) is AcquireState.ASKING:
        now = table.next_deadline()
        assert now is not None
        due = table.poll(now)
        assert all(a == first for a in due.acquires)
        repeats += [now - 100.0] * len(due.acquires)
        if due.timed_out:
            assert due.timed_out == (KEY,)
            assert now == 100.0 + module.ACQUIRE_SECONDS
    assert repeats[:5] == [1.0, 3.0, 7.0, 15.0, 31.0]
    assert table.outstanding() == []


def test_failure_backs_off_longer_each_time_and_rest_forgets(table: AcquireTable) -> None:
    now = 0.0
    for pause in (*module.BACKOFF_SECONDS, module.BACKOFF_SECONDS[-1]):
        need, acquire = ask(table, now)
        assert need is Need.ASKED
        assert acquire is not None
        assert table.failed(acquire.sequence, now) == KEY
        assert table.failed(acquire.sequence, now) is None
        assert ask(table, now + pause - 0.01) == (Need.BACKING_OFF, None)
        assert table.poll(now + pause) == Due(retry=(KEY,))
        now += pause
    assert table.poll(now + module.REST_SECONDS) == Due()
    assert table.state(KEY) is None
    assert len(table) == 0
    assert table.next_deadline() is None


def test_success_forgets_failures(table: AcquireTable) -> None:
    _, first = ask(table, 0.0)
    assert first is not None
    table.failed(first.sequence, 0.0)
    _, second = ask(table, 5.0)
    assert second is not None
    assert second.sequence != first.sequence
    assert table.satisfied(second.sequence, covered=True, now=5.1) == KEY
    assert table.state(KEY) is None
    assert ask(table, 5.2)[0] is Need.ASKED


def test_an_sa_made_by_others_resolves(table: AcquireTable) -> None:
    _, first = ask(table, 0.0)
    assert first is not None
    table.resolved(KEY)
    assert table.satisfied(first.sequence, covered=True, now=1.0) is None
    assert table.poll(1000.0) == Due()


def test_a_flow_that_the_new_sa_leaves_out_is_asked_for_at_once(table: AcquireTable) -> None:
    _, first = ask(table, 0.0, of=flow(1))
    assert first is not None
    assert ask(table, 0.1, of=flow(2))[0] is Need.WAITING
    assert table.satisfied(first.sequence, covered=True, now=0.2) == KEY
    need, second = ask(table, 0.2, of=flow(2))
    assert need is Need.ASKED
    assert second is not None
    assert second.flow == flow(2)


def test_an_sa_that_leaves_out_the_very_flow_that_asked_backs_off_for_that_flow_only(table: AcquireTable) -> None:
    _, first = ask(table, 0.0, of=flow(1))
    assert first is not None
    assert table.satisfied(first.sequence, covered=False, now=0.1) == KEY
    assert ask(table, 0.2, of=flow(1)) == (Need.BACKING_OFF, None)
    assert ask(table, 0.2, of=flow(2))[0] is Need.ASKED


def test_without_a_listener_it_is_state_and_sent_when_one_comes() -> None:
    table = AcquireTable()
    assert ask(table, 0.0, 1) == (Need.ASKED, None)
    assert ask(table, 0.0, 2) == (Need.ASKED, None)
    for now in (1.0, 3.0, 20.0):
        assert table.poll(now).acquires == ()
    table.listening(True, 21.0)
    assert table.next_deadline() is not None
    assert [a.policy for a in table.poll(21.0).acquires] == [9, 17]
    # Another one comes: it has to hear of them as well, at once.
    table.listening(False, 21.2)
    table.listening(True, 21.5)
    assert len(table.poll(21.5).acquires) == 2
    assert table.next_deadline() == 21.5 + module.REPEAT_SECONDS[0]


def test_the_rate_is_bounded_and_nothing_is_forgotten(table: AcquireTable) -> None:
    total = module.ACQUIRE_BURST + 500
    sent = [acquire for n in range(total) if (acquire := ask(table, 0.0, n)[1])]
    assert len(sent) == module.ACQUIRE_BURST
    now = 0.0
    while len(sent) < total:
        deadline = table.next_deadline()
        assert deadline is not None
        now = max(now + 0.01, deadline)
        due = table.poll(now)
        assert len(due.acquires) <= module.ACQUIRE_RATE * 0.011 + 1
        sent += due.acquires
    assert sorted(a.policy for a in sent) == [n * 8 + 1 for n in range(total)]
    assert now == pytest.approx(0.5, abs=0.02)


def test_one_policy_cannot_fill_the_table(table: AcquireTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ACQUIRES_PER_POLICY", 10)
    wildcard = policy(1, OPEN)
    needs = [table.need(peer_of(wildcard, OPEN, flow(n)), wildcard, OPEN, flow(n), 0.0)[0] for n in range(12)]
    assert needs == [Need.ASKED] * 10 + [Need.TABLE_FULL] * 2
    assert ask(table, 0.0, 2)[0] is Need.ASKED


def test_a_policy_that_goes_takes_its_acquires_along(table: AcquireTable) -> None:
    _, first = ask(table, 0.0, 1)
    ask(table, 0.0, 2)
    assert first is not None
    assert table.forget_policy(policy(1).index) == [KEY]
    assert table.peer(first.sequence) is None
    assert [a.policy for a in table.outstanding()] == [17]
    table.clear()
    assert table.next_deadline() is None


def test_sequence_numbers_wrap_past_those_in_use() -> None:
    table = AcquireTable(first_sequence=module.SEQUENCE_LIMIT - 1)
    for number in range(3):
        ask(table, 0.0, number)
    assert [a.sequence for a in table.outstanding()] == [module.SEQUENCE_LIMIT - 1, 1, 2]


class Life(RuleBasedStateMachine):
    """Every pair of state and input, in any order."""

    @initialize()
    def start(self) -> None:
        self.table = AcquireTable()
        self.now = 0.0
        self.model: dict[PeerKey, Acquire | None] = {}  # None: known, and nothing outstanding
        self.listening = False

    @rule(number=st.integers(0, 3), which=st.integers(0, 2))
    def need(self, number: int, which: int) -> None:
        key = peer_of(policy(number), TEMPLATE, flow(which))
        before = self.table.state(key)
        need, acquire = ask(self.table, self.now, number, flow(which))
        if before is AcquireState.ASKING:
            assert (need, acquire) == (Need.WAITING, None)
        elif before is None or before is AcquireState.RESTING:
            assert need is Need.ASKED
        if need is Need.ASKED:
            mine = [a for a in self.table.outstanding() if a.policy == policy(number).index]
            assert len(mine) == 1
            assert mine[0].flow == flow(which)
            assert acquire in (None, mine[0])
            self.model[key] = mine[0]
        else:
            assert acquire is None

    @rule(data=st.data(), what=st.sampled_from(["failed", "covered", "narrow", "resolved"]))
    def answer(self, data: st.DataObject, what: str) -> None:
        known = [(key, acquire) for key, acquire in self.model.items() if acquire is not None]
        if not known:
            assert self.table.failed(AcquireSequence(4_000_000), self.now) is None
            return
        key, acquire = data.draw(st.sampled_from(known))
        if what == "failed":
            assert self.table.failed(acquire.sequence, self.now) == key
        elif what == "resolved":
            self.table.resolved(key)
        else:
            assert self.table.satisfied(acquire.sequence, covered=what == "covered", now=self.now) == key
        assert self.table.state(key) is (AcquireState.BACKOFF if what in ("failed", "narrow") else None)
        self.model[key] = None

    @rule(listening=st.booleans())
    def listen(self, listening: bool) -> None:
        self.listening = listening
        self.table.listening(listening, self.now)

    @rule(seconds=st.sampled_from((0.0, 0.5, 3.0, 40.0, 200.0)))
    def time(self, seconds: float) -> None:
        self.now += seconds
        due = self.table.poll(self.now)
        for key in due.timed_out:
            assert self.model[key] is not None
            self.model[key] = None
        assert self.listening or not due.acquires
        for acquire in due.acquires:
            assert acquire in self.model.values()
        deadline = self.table.next_deadline()
        assert deadline is None or deadline > self.now

    @rule(number=st.integers(0, 3))
    def forget(self, number: int) -> None:
        self.table.forget_policy(policy(number).index)
        self.model = {key: acquire for key, acquire in self.model.items() if key.policy != policy(number).index}

    @invariant()
    def outstanding_is_what_was_asked_and_not_answered(self) -> None:
        if hasattr(self, "table"):
            assert set(self.table.outstanding()) == {acquire for acquire in self.model.values() if acquire is not None}
            if self.table.outstanding():
                assert self.table.next_deadline() is not None


Life.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
TestLife = pytest.mark.property(Life.TestCase)
