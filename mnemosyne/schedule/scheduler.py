"""Which requests run in the next step, and how much of each: admission, decodes, chunks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from mnemosyne.cache.ledger import Ledger
from mnemosyne.cache.table import PageTable
from mnemosyne.config import ScheduleConfig, SloConfig
from mnemosyne.request import Request
from mnemosyne.schedule.admission import AdmissionQueue, check_fits
from mnemosyne.schedule.decode_share import DecodeShare
from mnemosyne.schedule.growth import Growth
from mnemosyne.schedule.in_flight import StepsInFlight
from mnemosyne.schedule.leaves import Leaves
from mnemosyne.schedule.plan import Admission, Chunk, Plan
from mnemosyne.schedule.policy import POLICIES
from mnemosyne.schedule.predictor import LearningPredictor, Predictor
from mnemosyne.schedule.prefill import PrefillPlanner
from mnemosyne.schedule.prefixes import Prefixes
from mnemosyne.schedule.ready import ReadyDecodes
from mnemosyne.schedule.request_state import UNPLACED, RequestState
from mnemosyne.schedule.routing import NOTHING, Router
from mnemosyne.schedule.saves import Disk
from mnemosyne.schedule.spread import Spread
from mnemosyne.schedule.work import WorkModel


class Scheduler:
    """Continuous batching: decodes first, then chunks of prefill within the predicted time.

    Pages for prompt and ``max_tokens`` are reserved when a request is admitted; one whose end is
    not known grows, and may be set back (see ``growth``). What a step costs to plan depends on
    the step, not on how many requests there are.

    Args:
        config: chunk rule, policy, target time between tokens, limits.
        slo: when a first token is due.
        ledger: the pages of the cache, and whether requests share them.
        fingerprint: tells apart models that share nothing.
        predictor: step time; decides sizes only when ``config.chunk`` is "adaptive".
        work_model: counts the work of a chunk.
        depth: steps that may be in flight.
        disk: where prefixes outlive the process, if anywhere.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        slo: SloConfig,
        *,
        ledger: Ledger,
        fingerprint: bytes = b"",
        predictor: Predictor,
        work_model: WorkModel,
        depth: int = 1,
        disk: Disk | None = None,
    ) -> None:
        self.config = config
        self.ledger = ledger
        self._router = Router(ledger)
        self._prefixes = Prefixes(ledger, fingerprint) if ledger.shares else None
        self.predictor = predictor
        self._learner = predictor if isinstance(predictor, LearningPredictor) else None
        self.work_model = work_model
        self.depth = depth
        policy = POLICIES[config.policy]
        self._spread = Spread(ledger, self._router, config)
        self._prefill = PrefillPlanner(
            config,
            policy,
            predictor,
            work_model,
            self._spread,
            shard_tokens=ledger.max_tokens_per_group,
            depth=depth,
            max_lone_s=slo.max_wait_s,
        )
        self._admission = AdmissionQueue(
            policy, slo, ledger, self._router, self._prefill.table, self._prefixes
        )
        advance, compute_s = self._router.advance, self._prefill.table.seconds
        self.leaves = Leaves(disk, ledger, self._prefixes, advance, compute_s)
        self._growth = Growth(ledger, int(config.expected_tokens), self._spread.take_all_back)
        self._requests: dict[int, RequestState] = {}  # of all, those that wait included
        self._ready = ReadyDecodes(work_model)
        self._share = DecodeShare(config, policy, predictor, self._prefill.table, depth)
        self._num_decoding = 0  # of the running ones, past their prompts
        self._released: list[int] = []
        self._in_flight = StepsInFlight(depth)
        self._num_plans = 0

    @property
    def num_waiting(self) -> int:
        return len(self._admission)

    @property
    def num_running(self) -> int:
        return len(self._requests) - len(self._admission)

    def num_restored(self, request_id: int) -> int:
        """Tokens of a request's prompt that came from the disk."""
        return self._requests[request_id].num_restored

    def prefill_s(self, num_tokens: int) -> float:
        """Predicted time of prefilling a prompt of ``num_tokens`` tokens alone."""
        return self._prefill.table.seconds(0, num_tokens)

    def check_fits(self, request: Request) -> None:
        """Refuse a request that no empty cache could hold, with a ``ValueError``."""
        check_fits(request, self.ledger)

    def add(self, request: Request, *, is_filled: bool = False) -> float:
        """Queue a request.

        Args:
            request: of any kind.
            is_filled: whether the cache is said to hold the keys and values of its prompt already,
                so that its last token alone is computed: a bench fills the pages with anything.

        Returns:
            Its deadline for the first token, seconds after its arrival.

        Raises:
            ValueError: if it can never fit.
        """
        self.check_fits(request)
        state = self._requests[request.request_id] = self._admission.add(
            request,
            num_planned=request.num_prompt_tokens - 1 if is_filled else 0,
            num_reserved=self._growth.num_reserved(request),
            is_shared=not is_filled,
        )
        return state.deadline_s

    def release(self, request_id: int) -> None:
        """Forget a request that finished or was cancelled; its pages are free again.

        Pages of a request that is part of a step in flight are freed when that step is back.
        """
        running = self._requests[request_id]
        if running.table is UNPLACED:
            self._admission.discard(running)
            del self._requests[request_id]
            return
        running.is_released = True
        if running.is_prefilling:
            self._stop_prefill(running)
            is_in_flight = running.num_in_flight > 0
        else:
            is_in_flight = not self._withdraw(running)
        if not is_in_flight:
            self._forget(running)

    def _stop_prefill(self, running: RequestState) -> None:
        """Have a prompt computed, or restored, no further."""
        if not self.leaves.discard(running):
            self._prefill.discard(running)

    def _withdraw(self, running: RequestState) -> bool:
        """Have a request decode no more; whether it was in no step."""
        request_id = running.request.request_id
        self._num_decoding -= 1
        if self._growth.stalled.pop(request_id, None) is not None:
            return True
        return self._ready.discard(request_id, running.table)

    def reset(self, lost: Iterable[Plan] = ()) -> None:
        """Forget every request, in whatever state an interruption left them; all pages are free.

        Args:
            lost: plans whose steps are given up; an executor may not have seen what they released.
        """
        for plan in lost:
            self._released += plan.released
        self._released += [i for i, p in self._requests.items() if p.table is not UNPLACED]
        self._admission.clear()
        self._prefill.clear()
        self._requests.clear()
        self._ready.clear()
        self._share.clear()
        self._growth.stalled.clear()
        self._num_decoding = 0
        self._in_flight.clear()
        self.ledger.reset()
        if self._prefixes is not None:
            self._prefixes.clear()
        self.leaves.clear()
        self._router.clear()
        self._spread.clear()

    def clear_cache(self, *, on_disk: bool = False) -> None:
        """Know no prefix any more, ``on_disk`` neither; requests keep the pages that they hold."""
        if self._prefixes is not None:
            self.ledger.clear()
            self._prefixes.clear()
        if on_disk:
            self.leaves.remove_all()

    def plan(self, now_s: float) -> Plan | None:
        """The next step, or None if nothing can run.

        Args:
            now_s: seconds on the clock of the requests' arrivals.
        """
        tables, set_back = self._grow() if self._growth.stalled else ({}, [])
        admitted = self._spread.admit(self._admission, self.num_running, now_s)
        for running in admitted:
            if not self.leaves.begin(running):
                self._prefill.add(running)
        chunks, work = self._share.take(self._ready, self._num_decoding, self._requests, now_s)
        behind_s = self._in_flight.done_s(now_s)
        prefills = self._prefill.plan(work, behind_s, delays_decodes=self._num_decoding > 0)
        for running, chunk in zip(prefills.prompts, prefills.chunks, strict=True):
            self._router.advance(running.table, chunk.start, chunk.start + chunk.num_tokens)
            self._num_decoding += chunk.samples
        chunks += prefills.chunks
        restores = self.leaves.restores(has_others=bool(chunks))
        if not chunks and not restores:
            assert not admitted, "an admitted request always has a chunk to compute"
            return None
        tables |= self._spread.changed() | {p.request.request_id: p.table for p in admitted}
        self._in_flight.add(self._num_plans, prefills.work, now_s, prefills.seconds)
        released, self._released = tuple(self._released), []
        self._num_plans += 1
        return Plan(
            index=self._num_plans - 1,
            chunks=tuple(chunks),
            admitted=tuple([Admission.of(running.request) for running in admitted]),
            released=released,
            tables=tuple(tables.items()),
            copies=self._prefixes.copies() if self._prefixes is not None else (),
            saves=self.leaves.saves(prefills.seconds, delays_decodes=self._num_decoding > 0),
            fetches=self.leaves.fetches(),
            restores=restores,
            set_back=tuple(set_back),
            predicted_s=prefills.seconds,
            slack_s=tuple(prefills.slack_s),
            num_handed=prefills.num_handed,
            hits=tuple([running.hit for running in admitted if running.hit is not None]),
        )

    def plan_saves(self) -> Plan | None:
        """A step that only copies what goes to the disk, for when no other follows, or None."""
        saves = self.leaves.rest()
        if not saves:
            return None
        released, self._released = tuple(self._released), []
        self._num_plans += 1
        return Plan(self._num_plans - 1, (), released=released, saves=saves)

    def complete(
        self,
        plan: Plan,
        tokens: Mapping[int, int],
        broken: Collection[int] = (),
        restored: Mapping[int, int] = NOTHING,
    ) -> None:
        """Take note that a step is back.

        Args:
            plan: the step.
            tokens: what it sampled, by request; each is the decode of a step to come.
            broken: requests whose keys or values may not be finite.
            restored: by request, how many of its leaves were whole.
        """
        self._in_flight.remove(plan.index)
        shares, page_size = self._prefixes, self.ledger.page_size
        if shares is not None:
            shares.complete(plan, self._requests, broken)
        for running in self.leaves.complete(plan, restored, self._requests):
            if running.is_released:
                self._forget(running)
            else:
                self._admission.look_up(running)
                self._prefill.add(running)
        decodes, rows = dict[int, Chunk](), list[tuple[int, PageTable]]()
        for request_id, start, num_tokens, samples, token_id, _ in plan.chunks:
            running = self._requests[request_id]
            if token_id is None:
                running.num_in_flight -= 1
            if running.is_released:
                if running.num_in_flight == 0:
                    self._forget(running)
            elif samples:
                stop = start + num_tokens
                decode = Chunk.decode(request_id, stop, tokens[request_id])
                if running.outputs is not None:
                    running.outputs.append(tokens[request_id])
                    if stop % page_size == 0 and token_id is not None and shares is not None:
                        shares.fill(running)
                    if running.request.is_open and not self._growth.has_page(running, stop):
                        self._growth.stalled[request_id] = decode
                        continue
                decodes[request_id] = decode
                rows.append((stop, running.table))
        self._ready.add(decodes, rows)

    def learn(self, plan: Plan, seconds: float) -> None:
        """Tell the predictor how long a step really took, if it wants to know."""
        work = self._in_flight.take_work(plan.index)
        if self._learner is not None and plan.chunks and not plan.restores:
            self._learner.observe(max(work, key=self._learner.predict), seconds)

    def _grow(self) -> tuple[dict[int, PageTable], list[int]]:
        """Give stalled requests pages; the tables that changed, and who was set back for it."""
        tables, set_back = dict[int, PageTable](), list[int]()
        for running in self._growth.in_order(self._requests):
            request_id = running.request.request_id
            while request_id in self._growth.stalled:
                decode = self._growth.grow(running)
                if decode is not None:
                    self._ready.add({request_id: decode}, [(decode.start, running.table)])
                    tables[request_id] = running.table
                    break
                victim = self._growth.victim(self._requests.values(), self._ready)
                if victim is None:
                    break  # whoever could give pages up is in a step
                tables.pop(victim.request.request_id, None)
                set_back.append(victim.request.request_id)
                self._set_back(victim)
        return tables, set_back

    def _set_back(self, running: RequestState) -> None:
        """Take a request's pages away; its output so far is part of its prompt from now on."""
        withdraw = self._stop_prefill if running.is_prefilling else self._withdraw
        withdraw(running)
        self._forget(running)
        request, num_set_back = self._growth.again(running), running.num_set_back + 1
        state = self._requests[request.request_id] = self._admission.add(
            request,
            num_reserved=self._growth.num_reserved(request, num_set_back),
            is_shared=running.chain is not None,
            due_s=running.due_s,
        )
        state.num_set_back = num_set_back

    def _forget(self, running: RequestState) -> None:
        request = running.request
        del self._requests[request.request_id]
        num_done = min(running.num_planned, request.num_prompt_tokens)
        self._router.advance(running.table, num_done, request.num_prompt_tokens)
        if self._prefixes is not None and running.chain is not None:
            self._prefixes.end(running)
        else:
            self.ledger.release(request.request_id)
        self._spread.forget(request.request_id)
        self._admission.note_release(request.request_id)
        self._released.append(request.request_id)
