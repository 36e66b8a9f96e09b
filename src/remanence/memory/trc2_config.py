"""The settings of TRC2, and the cache of a model that decodes token by token: keys and values of the attention, and the side loops' constant-size states."""

from __future__ import annotations

from torch import LongTensor, Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from remanence.errors import Mistake


class TRC2Config(PreTrainedConfig):
    """The settings of a `TRC2ForCausalLM`; see `trc2` for the names.

    Args:
        vocab_size: V, tokens of the vocabulary.
        hidden_size: d, width of the stream.
        num_hidden_layers: L, columns.
        num_attention_heads: query heads of a column.
        num_key_value_heads: key and value heads, which queries share.
        intermediate_size: width of one expert.
        num_experts: E, experts of a column beside the shared one.
        experts_per_token: experts that a token goes to.
        max_position_embeddings: the longest text.
        rope_theta: base of the rotary positions.
        rms_norm_eps: of all norms.
        dropout: of embeddings, attention and experts.
        initializer_range: deviation of the first weights.
        tie_word_embeddings: whether the head is the embedding.
        use_cache: return a cache.
        thalamus: whether columns modulate the next one's queries.
        hippocampus: whether events are written and read.
        inject_layer: l_inj, the column behind which memory is read, from 0; None: L // 2 - 1.
        rank: r, width of the side channel; None: d / 8.
        trn_groups: groups of channels that compete; None: r / 8.
        focal_width: tokens of the focal path's convolution.
        diffuse_decay: of the diffuse path's average over the past; None: all tokens alike.
        slots: N, of the memory.
        read_k: k, slots read per token.
        sharpness: beta, multiplies the cosines of a read.
        write_m: m, tokens of a row that are written behind a step.
        merge_cosine: a new entry this near to a slot is merged into it.
        merge_keep: share of the old value that a merge keeps.
        age_decay: of a slot's strength per step.
        discount: gamma of the critics.
        slow_rate: how far the slow critic follows the fast one per step.
        event_quantile: share of the surprises below which nothing is an event.
        critic_weight: of the critics' loss.
        balance_weight: of the experts' load balance.
        slot_span: s, tokens kept with each slot, the written one last, from which it is encoded anew when the weights have moved; 0: none.
        online: write in evaluation too.
        reset_token_id: ends a document: the diffuse path starts anew behind it.
    """

    model_type = "trc2"
    keys_to_ignore_at_inference = ("cache",)

    vocab_size: int = 50432
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    intermediate_size: int = 1024
    num_experts: int = 8
    experts_per_token: int = 2
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    thalamus: bool = True
    hippocampus: bool = True
    inject_layer: int | None = None
    rank: int | None = None
    trn_groups: int | None = None
    focal_width: int = 4
    diffuse_decay: float | None = None
    slots: int = 512
    read_k: int = 8
    sharpness: float = 8.0
    write_m: int = 4
    merge_cosine: float = 0.9
    merge_keep: float = 0.9
    age_decay: float = 0.999
    discount: float = 0.9
    slow_rate: float = 0.1
    event_quantile: float = 0.8
    critic_weight: float = 0.1
    balance_weight: float = 0.01
    slot_span: int = 0
    online: bool = False
    reset_token_id: int | None = None

    @property
    def side_rank(self) -> int:
        """r, the width of the side channel."""
        return self.rank or max(1, self.hidden_size // 8)

    @property
    def inject(self) -> int:
        """The column behind which memory is read, from 0."""
        return self.inject_layer if self.inject_layer is not None else self.num_hidden_layers // 2 - 1

    @property
    def groups(self) -> int:
        """Groups of channels that compete."""
        return self.trn_groups or max(1, self.side_rank // 8)

    def check(self) -> None:
        """Refuse settings that fit no model.

        Raises:
            Mistake: naming the setting.
        """
        if self.side_rank % self.groups:
            raise Mistake("trc2.rank", f"{self.side_rank} channels do not make {self.groups} equal groups", "give a multiple of trn_groups")
        if not 1 <= self.read_k <= self.slots:
            raise Mistake("trc2.read_k", f"is {self.read_k} of {self.slots} slots", "read between 1 and all of them")
        if self.slot_span < 0:
            raise Mistake("trc2.slot_span", f"is {self.slot_span}", "give 0 (slots keep no tokens) or more")
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise Mistake(
                "trc2.experts_per_token", f"is {self.experts_per_token} of {self.num_experts}", "choose between 1 and all of them"
            )
        if self.hidden_size % (2 * self.num_attention_heads) or self.num_attention_heads % self.num_key_value_heads:
            problem = f"{self.hidden_size} channels, {self.num_attention_heads} heads and {self.num_key_value_heads} key heads do not fit"
            raise Mistake("trc2.num_attention_heads", problem, "heads divide the width into even parts, key heads divide the heads")
        if self.hippocampus and not 0 <= self.inject < self.num_hidden_layers - 1:
            raise Mistake(
                "trc2.inject_layer", f"is {self.inject} of {self.num_hidden_layers} columns", "leave a later column that can listen"
            )


class TRC2Cache(DynamicCache):
    """Keys and values of the attention, and the constant-size states of the side loops."""

    def __init__(self) -> None:
        super().__init__()
        self.side: dict[str, dict[str, Tensor]] = {}

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Let beams take the states of those they continue."""
        super().reorder_cache(beam_idx)
        self.batch_select_side(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        super().batch_select_indices(indices)
        self.batch_select_side(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        super().batch_repeat_interleave(repeats)
        self.side = {name: {key: value.repeat_interleave(repeats, 0) for key, value in state.items()} for name, state in self.side.items()}

    @property
    def is_croppable(self) -> bool:
        """The side loops' states hold no history, so nothing can be taken back."""
        return False

    def crop(self, *_: object, **__: object) -> None:
        """Refuse to take tokens back.

        Raises:
            Mistake: always.
        """
        raise Mistake("trc2 cache", "cannot take tokens back: the side loops keep sums, not histories", "decode without an assistant model")

    def batch_select_side(self, rows: Tensor) -> None:
        """Keep some sequences of the side loops' states."""
        self.side = {name: {key: value[rows.to(value.device)] for key, value in state.items()} for name, state in self.side.items()}
