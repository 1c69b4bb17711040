"""The model, as lm-evaluation-harness sees it: requests for log-likelihoods and texts, which a Judge computes."""

from typing import Any

from lm_eval import utils as lm_eval_utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from smoltrain.config.schema import GenerationSection
from smoltrain.errors import Problem, UserError
from smoltrain.evaluation.judge import Judge, WriteRequest
from smoltrain.evaluation.score import Window


class HarnessModel(TemplateLM):
    """A Judge behind the interface of lm_eval, in the place of its own class HFLM."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self._judge = judge
        self._num_scored = 0  # texts
        self._num_cut = 0  # of them, those that lost their beginning
        self._num_written = 0
        self._num_shortened = 0  # of those that were written, which may have fewer tokens than the task allows

    @property
    def eot_token_id(self) -> int:
        """What ends a text, and begins one."""
        return self._judge.tokenizer.separator_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: ARG002
        """Ids of a text: it is text, also where it spells a special token."""
        return self._judge.tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # noqa: ARG002
        """Log-likelihood of each second text behind the first, and whether it is the likeliest."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        windows = [self._make_window(context, continuation) for _, context, continuation in requests]
        return [(score.log_probability, score.is_greedy) for score in self._judge.score(windows)]

    def _make_window(self, context: list[int], continuation: list[int]) -> Window:
        """Errors: UserError for a continuation that the model cannot read whole."""
        longest = self._judge.context
        if not 0 < len(continuation) <= longest:
            what = "a task asks for the likelihood of a text that the model cannot score"
            saw = f"{len(continuation):,} tokens"
            raise UserError(Problem(what, saw, f"1 to {longest:,}, the model's positions", "--tasks or evaluate.tasks"))
        ids = [*context, *continuation]
        self._num_scored += 1
        self._num_cut += len(ids) > longest + 1
        return Window(ids[-longest - 1 :], len(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Log-likelihoods of whole texts, cut as the harness cuts them: into windows that overlap by one token."""
        windows: list[Window] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            pairs = lm_eval_utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self._judge.context, context_len=1
            )
            for context, continuation in map(lm_eval_utils.make_disjoint_window, pairs):
                windows.append(Window([*context, *continuation], len(continuation)))
                owners.append(number)
        self._num_scored += len(requests)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._judge.score(windows), strict=True):
            totals[owner] += score.log_probability
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """What the model writes behind each text."""
        return self._judge.write([self._make_write_request(*request.args) for request in requests])

    def _make_write_request(self, context: str, options: dict[str, Any]) -> WriteRequest:
        """As much of the context as leaves room for the new tokens; those take half of the positions at most."""
        settings: Any = normalize_gen_kwargs(options)
        asked = settings["max_gen_toks"]
        max_tokens = min(asked, max(1, self._judge.context // 2))
        room = self._judge.context - max_tokens
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self._num_written += 1
        self._num_shortened += max_tokens < asked or len(ids) > room
        generation = GenerationSection(
            max_tokens=max_tokens, temperature=settings["temperature"] if settings["do_sample"] else 0.0,
            top_k=int(settings.get("top_k") or 0), top_p=float(settings.get("top_p") or 1.0),
        )  # fmt: skip
        stop_texts = tuple(stop for stop in settings["until"] if stop)  # an empty one would stop before anything
        return WriteRequest(ids[-room:], generation, stop_texts)

    def describe_cuts(self) -> list[str]:
        """Lines on what did not fit the model."""
        longest = f"the model's {self._judge.context:,} positions"
        lines: list[str] = []
        if self._num_cut:
            lines.append(f"{self._num_cut:,} of {self._num_scored:,} texts lost their beginning, longer than {longest}")
        if self._num_shortened:
            counts = f"{self._num_shortened:,} of {self._num_written:,}"
            lines.append(f"{counts} texts to write had less room than their task allows: {longest}")
        return lines
