"""KV cache of MiMo-V2: growing buffers for global layers, bounded buffers with exact rollback for sliding layers.

Every stored tensor is `[batch, kv_heads, rows, width]` (a row is a token, oldest first). K and V may differ in width,
layers in kv_heads. Gradients flow to the states passed to one `update`, never to states stored before it.
"""

import copy
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


_FILE_FORMAT = "modeling_mimo.HybridCache.1"
# What decides the meaning of stored keys and values
_FINGERPRINT_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "layer_types",
    "hidden_size",
    "num_key_value_heads",
    "head_dim",
    "v_head_dim",
    "swa_num_key_value_heads",
    "swa_head_dim",
    "swa_v_head_dim",
    "sliding_window",
    "rope_parameters",
    "attention_value_scale",
)
# Far more than the three drafts of the MTP heads, and few beside a window of 128
DEFAULT_ROLLBACK = 32
_FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@contextmanager
def _storage_mode():
    # A buffer made under inference_mode could not be written in place by a later call outside it
    with torch.inference_mode(False), torch.no_grad():
        yield


def _copy_to_device(rows: Tensor, device: torch.device) -> Tensor:
    """`rows` itself when already on `device`, else a contiguous copy there."""
    if rows.device == device:
        return rows
    out = torch.empty(rows.shape, dtype=rows.dtype, device=device)
    # One contiguous block per batch row and head: a strided copy would first be gathered into unpinned CPU memory
    for target, source in zip(out.flatten(0, 1), rows.flatten(0, 1)):
        target.copy_(source, non_blocking=True)
    return out


def _concat_rows(past: Sequence[Tensor], new: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    if past[0].shape[2] == 0:
        return tuple(new)
    return tuple(torch.cat(pair, dim=2) for pair in zip(past, new))


def _quantize(states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float8 codes `[batch, kv_heads, n, width]` and their fp32 scales `[batch, kv_heads, n, 1]`."""
    states = states.float()
    # `tiny` keeps an all-zero row at 0 instead of 0/0
    scales = states.abs().amax(-1, keepdim=True).div(torch.finfo(dtype).max).clamp_min(torch.finfo(torch.float32).tiny)
    # Kept as uint8: indexing and file operations know bytes on every device, float8 only on some
    return (states / scales).to(dtype).view(torch.uint8), scales


class _BufferedCacheLayer(CacheLayerMixin):
    """Rows `[start, start + stored)` of each buffer are live; `total` tokens were seen and not cropped."""

    is_compileable = False
    is_croppable = True
    pin_memory = False
    max_rollback: int | None = None

    def __init__(self) -> None:
        # Not CacheLayerMixin.__init__: it assigns `keys`, `values`, `is_initialized`, which are computed here
        self.reset()

    def reset(self) -> None:
        """Forgets every token and frees the storage; the next `update` may differ in batch, dtype or device."""
        self._set_buffers(())
        self.start = self.stored = self.total = 0

    def _set_buffers(self, buffers: Iterable[Tensor]) -> None:
        self.buffers = tuple(buffers)
        # Rows below this one belong to a snapshot or fork too; sys.maxsize: the buffers belong to another layer
        self.protected = 0

    def _allocate(self, like: Tensor, batch: int, rows: int, device: torch.device) -> Tensor:
        shape = (batch, like.shape[1], rows, like.shape[3])
        return torch.empty(shape, dtype=like.dtype, device=device, pin_memory=self.pin_memory and device.type == "cpu")

    @property
    def is_initialized(self) -> bool:
        return len(self.buffers) > 0

    def live_rows(self) -> list[Tensor]:
        """Views `[batch, kv_heads, stored, width]`, one per buffer."""
        return [buffer[:, :, self.start : self.start + self.stored] for buffer in self.buffers]

    def _decode(self, rows: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return rows[0], rows[1]

    @property
    def keys(self) -> Tensor | None:
        """Stored keys `[batch, kv_heads, stored, head_dim]`, None when empty; fp8 storage reads as float32."""
        return self._decode(self.live_rows(), torch.float32)[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """Stored values `[batch, kv_heads, stored, v_head_dim]`, None when empty; fp8 storage reads as float32."""
        return self._decode(self.live_rows(), torch.float32)[1] if self.is_initialized else None

    def _check_states(self, states: Sequence[Tensor]) -> None:
        # copy_ would silently broadcast a batch of 1 and cast another dtype
        def signature(tensors):
            return [(t.dtype, t.shape[0], t.shape[1], t.shape[3]) for t in tensors]

        if signature(states) != signature(self.buffers):
            raise ValueError(
                "HybridCache.update: (dtype, batch, kv_heads, width) of the stored keys and values expected "
                f"{signature(self.buffers)}, got {signature(states)}"
            )

    def get_seq_length(self) -> int:
        """Number of tokens seen and not cropped (sliding layers hold fewer)."""
        return self.total

    def croppable_tokens(self) -> int:
        """Number of tokens `crop` can remove right now with an exact result."""
        return self.total

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises the ValueError that `crop` would raise; changes nothing."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected a negative number of tokens to remove, or 0, got {tokens_to_remove}")
        if -tokens_to_remove > self.croppable_tokens():
            raise ValueError(
                f"crop: expected at most {self.croppable_tokens()} tokens to remove from the {self.total} in a "
                f"{type(self).__name__} (max_rollback={self.max_rollback}), got {-tokens_to_remove}"
            )

    def activate_past_recording(self) -> None:
        """Does nothing: the past is always recorded, within a fixed bound."""

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens; ValueError, and no change, if that is not exactly possible."""
        self.check_crop(tokens_to_remove)
        self.stored += tokens_to_remove
        self.total += tokens_to_remove

    @_storage_mode()
    def shift_rows(self, amounts: Sequence[int]) -> None:
        """Moves what batch row i holds `amounts[i]` slots on: its last tokens go, and as many slots ahead of it hold
        none of it."""
        if not any(amounts) or not self.is_initialized:
            return
        if self.protected:
            # a snapshot or fork reads these buffers too
            self._set_buffers([buffer.clone() for buffer in self.buffers])
        for rows in self.live_rows():
            for row, amount in zip(rows, amounts):
                if amount:
                    # clone: source and target slots overlap
                    row[:, amount:] = row[:, : self.stored - amount].clone()

    def align_rows(self, ends: Sequence[int], length: int) -> None:
        """Moves batch row i, which ends in the last slot, to end before slot `ends[i]` of `length` slots; zeros
        behind it."""
        if not self.is_initialized:
            return
        stored, aligned = min(self.stored, length), []
        with _storage_mode():
            for rows in self.live_rows():
                aligned.append(torch.zeros_like(rows[:, :, :stored]))
                for target, row, end in zip(aligned[-1], rows, ends):
                    kept = max(0, stored - (length - end))
                    target[:, :kept] = row[:, self.stored - kept :]
        self.load_rows(aligned, length)

    @_storage_mode()
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Batch row i becomes the former row `beam_idx[i]`."""
        selected = []
        for buffer in self.buffers:
            # Spare rows go along, so that beam search does not have to grow the buffers at every step
            out = self._allocate(buffer, len(beam_idx), buffer.shape[2], buffer.device)
            selected.append(torch.index_select(buffer, 0, beam_idx.to(buffer.device), out=out))
        self._set_buffers(selected)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each batch row `repeats` times in a row."""
        if self.is_initialized:
            self.reorder_cache(torch.arange(self.buffers[0].shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the batch rows `indices`: a tensor of row numbers or a mask `[batch]`."""
        if self.is_initialized:
            self.reorder_cache(torch.arange(self.buffers[0].shape[0])[indices.cpu()])


class GlobalCacheLayer(_BufferedCacheLayer):
    """Keeps every token in buffers that grow by an eighth, `[batch, kv_heads, capacity, width]`.

    Args:
        storage_dtype: `None`, or a float8 dtype: stored as bytes plus one fp32 scale per token and head.
        offload: keep the buffers on the CPU (pinned if CUDA is available); `update` returns copies on their device.
    """

    is_sliding = False

    def __init__(self, storage_dtype: torch.dtype | None = None, offload: bool = False) -> None:
        self.storage_dtype = storage_dtype
        self.offload_storage = offload
        self.pin_memory = offload and torch.cuda.is_available()
        super().__init__()

    def _encode(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, ...]:
        if self.storage_dtype is None:
            return key_states, value_states
        codes, scales = zip(*(_quantize(states, self.storage_dtype) for states in (key_states, value_states)))
        return (*codes, *scales)

    def _decode(self, rows: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.storage_dtype is None:
            return rows[0], rows[1]
        # Every float8 value is exact in bf16 and fp16; mul_ by an fp32 scale computes in fp32 and rounds once
        keys, values = (codes.view(self.storage_dtype).to(dtype) for codes in rows[:2])
        return keys.mul_(rows[2]), values.mul_(rows[3])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Fixes batch, heads, widths and dtype from `[batch, kv_heads, n, width]` states; allocates no row."""
        self._set_buffers(self._encode(key_states[:, :, :0], value_states[:, :, :0]))

    def _reserve(self, rows: int, device: torch.device) -> None:
        """Makes rows `[total, rows)` writable in buffers on `device`; copies the live rows only when it has to."""
        old_capacity = self.buffers[0].shape[2]
        if rows <= old_capacity and self.total >= self.protected and self.buffers[0].device == device:
            return
        # A prefill of n tokens takes about n rows; growth by an eighth keeps appending O(1) per token and the room to
        # spare below an eighth of what is stored
        capacity = max(rows + 256, old_capacity + old_capacity // 8)
        grown = []
        for buffer, live in zip(self.buffers, self.live_rows()):
            grown.append(self._allocate(buffer, buffer.shape[0], capacity, device))
            grown[-1][:, :, : self.total].copy_(live)
        self._set_buffers(grown)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends `[batch, kv_heads, n, width]` states; returns all keys and values `[batch, kv_heads, total, width]`.

        The result is a view of the buffers, except for fp8 or offloaded storage and for states that require grad.
        Raises ValueError if batch, heads, widths or dtype differ from what is stored.
        """
        past, device = self.total, key_states.device
        with _storage_mode():
            if past == 0:
                self.reset()
                self.lazy_initialization(key_states, value_states)
            states = self._encode(key_states, value_states)
            self._check_states(states)
            total = past + key_states.shape[2]
            self._reserve(total, torch.device("cpu") if self.offload_storage else device)
            for buffer, state in zip(self.buffers, states):
                buffer[:, :, past:total].copy_(state)
            self.stored = self.total = total
        keys, values = self._decode([_copy_to_device(rows, device) for rows in self.live_rows()], key_states.dtype)
        if key_states.requires_grad or value_states.requires_grad:
            return _concat_rows((keys[:, :, :past], values[:, :, :past]), (key_states, value_states))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """`(kv_length, kv_offset)` of what `update` will return for `query_length` new tokens."""
        return self.total + query_length, 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def snapshot_state(self) -> tuple[tuple[Tensor, ...], int]:
        """The buffers themselves and the number of rows in use, which this layer will not overwrite from now on."""
        self.protected = max(self.protected, self.total)
        return self.buffers, self.total

    def restore_state(self, state: tuple[tuple[Tensor, ...], int]) -> None:
        """Goes back to a `snapshot_state` of this or another layer, without copying."""
        buffers, total = state
        if buffers is not self.buffers:
            # Only the layer that allocated buffers may append to them in place, and it may have replaced them since
            self.buffers, self.protected = buffers, sys.maxsize
        self.start, self.stored, self.total = 0, total, total

    def load_rows(self, rows: Sequence[Tensor], total: int) -> None:
        """Takes over rows `[batch, kv_heads, total, width]`, one tensor per buffer."""
        self.reset()
        self._set_buffers(rows)
        self.stored = self.total = total


class SlidingCacheLayer(_BufferedCacheLayer):
    """Keeps the last `sliding_window - 1 + max_rollback` tokens in `sliding_window + 2 * max_rollback` rows.

    Args:
        sliding_window: number of keys a query sees, itself included.
        max_rollback: how many of the latest tokens can be cropped exactly; 0: none once the window is full.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, max_rollback: int = 32) -> None:
        self.sliding_window = sliding_window
        self.max_rollback = max_rollback
        self.max_stored = sliding_window - 1 + max_rollback
        super().__init__()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates for the batch, heads, widths, dtypes and device of `[batch, kv_heads, n, width]` states."""
        # max_rollback + 1 rows to spare: the live rows move to the front once per that many tokens, not once per token
        capacity = self.sliding_window + 2 * self.max_rollback
        self._set_buffers(
            self._allocate(state, state.shape[0], capacity, state.device) for state in (key_states, value_states)
        )

    def _append(self, states: Sequence[Tensor]) -> None:
        tail = min(states[0].shape[2], self.max_stored)
        end = self.start + self.stored
        if end + tail > self.buffers[0].shape[2]:
            kept = min(self.stored, self.max_stored - tail)
            for buffer in self.buffers:
                # clone: source and target rows may overlap
                buffer[:, :, :kept].copy_(buffer[:, :, end - kept : end].clone())
            self.stored = end = kept
        for buffer, state in zip(self.buffers, states):
            buffer[:, :, end : end + tail].copy_(state[:, :, state.shape[2] - tail :])
        self.stored = min(self.stored + tail, self.max_stored)
        self.start = end + tail - self.stored
        self.total += states[0].shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends n tokens; returns the last `sliding_window - 1` earlier ones (or fewer) followed by the n new ones.

        Shapes `[batch, kv_heads, n, width]` in, `[batch, kv_heads, get_mask_sizes(n)[0], width]` out. Up to
        `max_rollback` new tokens come back as views, valid until the next `update`; more are not all kept.
        Raises ValueError if batch, heads, widths or dtype differ from what is stored.
        """
        states = (key_states, value_states)
        length = key_states.shape[2]
        past = min(self.total, self.sliding_window - 1)
        with _storage_mode():
            if self.total == 0:
                self.reset()
                self.lazy_initialization(key_states, value_states)
            elif self.buffers[0].device != key_states.device:
                self._set_buffers([buffer.to(key_states.device) for buffer in self.buffers])
            self._check_states(states)
        returned = None
        if length > self.max_rollback or key_states.requires_grad or value_states.requires_grad:
            # Joined before the write below moves rows
            returned = _concat_rows([rows[:, :, self.stored - past :] for rows in self.live_rows()], states)
        with _storage_mode():
            self._append(states)
        if returned is None:
            returned = tuple(rows[:, :, self.stored - past - length :] for rows in self.live_rows())
        return returned

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """`(kv_length, kv_offset)` of what `update` will return for `query_length` new tokens."""
        past = min(self.total, self.sliding_window - 1)
        return past + query_length, self.total - past

    def get_max_length(self) -> int:
        """The sliding window, as `DynamicSlidingWindowLayer` has it."""
        return self.sliding_window

    def croppable_tokens(self) -> int:
        """Number of tokens `crop` can remove right now with a full window left; all of them while all are stored."""
        return self.total if self.stored == self.total else self.stored - (self.sliding_window - 1)

    def snapshot_state(self) -> tuple[list[Tensor], int]:
        """Copies of the live rows, and the number of tokens seen."""
        with _storage_mode():
            return [rows.clone() for rows in self.live_rows()], self.total

    def restore_state(self, state: tuple[list[Tensor], int]) -> None:
        """Goes back to a `snapshot_state` of this or another layer of the same window."""
        self.load_rows(*state)

    def load_rows(self, rows: Sequence[Tensor], total: int) -> None:
        """Copies the last rows `[batch, kv_heads, n, width]` of a state of `total` tokens into buffers of its own."""
        self.reset()
        if total == 0:
            return
        with _storage_mode():
            self.lazy_initialization(rows[0], rows[1])
            self._append(rows)
        self.total = total


def _config_fields(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _FINGERPRINT_FIELDS}


def _canonical_json(fields: dict[str, Any]) -> str:
    # Every integer is read as a float: 10000 and 10000.0 are the same rope_theta
    return json.dumps(json.loads(json.dumps(fields), parse_int=float), sort_keys=True, separators=(",", ":"))


def cache_fingerprint(config: Any) -> str:
    """sha256 hex digest of the config fields that decide what stored keys and values mean."""
    return hashlib.sha256(_canonical_json(_config_fields(config)).encode()).hexdigest()


def _check_fields(expected: dict[str, Any], got: dict[str, Any], source: str) -> None:
    if expected != got:
        names = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        fields = "; ".join(f"{name} expected {expected.get(name)}, got {got.get(name)}" for name in names)
        raise ValueError(f"{source} was made for another config: {fields}")


@dataclass(frozen=True)
class CacheSnapshot:
    """What `HybridCache.restore` needs: global layers' buffers by reference, sliding layers' rows copied."""

    config_fields: dict[str, Any]
    global_dtype: torch.dtype | None
    layer_states: tuple[tuple[Sequence[Tensor], int], ...]


class HybridCache(Cache):
    """KV cache with exact bounded rollback, for the `cache` of a model with full and sliding attention layers.

    Args:
        config: has `layer_types`, `sliding_window` (keys a query sees, itself included) and what a fingerprint reads.
        max_rollback: how many of the latest tokens `crop` can remove, counted from the largest length so far;
            rejecting more drafts than this at once raises ValueError.
        global_dtype: `None` (the dtype of the states), `torch.float8_e4m3fn` or `torch.float8_e5m2` for global layers.
        offload_global: keep global layers' storage on the CPU.
    """

    def __init__(
        self,
        config: Any,
        max_rollback: int = DEFAULT_ROLLBACK,
        global_dtype: torch.dtype | None = None,
        offload_global: bool = False,
    ) -> None:
        # Copied: a later change of the config must not pass check_config
        self.config_fields = copy.deepcopy(_config_fields(config))
        self.fingerprint = cache_fingerprint(config)
        layer_types = self.config_fields["layer_types"]
        if len(layer_types) != config.num_hidden_layers or set(layer_types) - {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"layer_types: expected {config.num_hidden_layers} of 'full_attention' or 'sliding_attention', "
                f"got {layer_types}"
            )
        if "sliding_attention" in layer_types and (not config.sliding_window or config.sliding_window < 1):
            raise ValueError(f"sliding_window: expected at least 1 key, got {config.sliding_window}")
        if max_rollback < 0:
            raise ValueError(f"max_rollback: expected at least 0 tokens, got {max_rollback}")
        if global_dtype is not None and global_dtype not in _FP8_DTYPES:
            raise ValueError(f"global_dtype: expected None or one of {_FP8_DTYPES}, got {global_dtype}")
        self.max_rollback = max_rollback
        self.global_dtype = global_dtype
        self.offload_global = offload_global
        super().__init__(layers=self._new_layers())

    def _new_layers(self) -> list[_BufferedCacheLayer]:
        return [
            GlobalCacheLayer(self.global_dtype, self.offload_global)
            if layer_type == "full_attention"
            else SlidingCacheLayer(self.config_fields["sliding_window"], self.max_rollback)
            for layer_type in self.config_fields["layer_types"]
        ]

    def check_config(self, config: Any) -> None:
        """Raises ValueError naming the fields in which `config` differs from the one this cache was made for."""
        _check_fields(_config_fields(config), self.config_fields, "HybridCache")

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens, as if they had never been seen; 0 does nothing.

        Raises ValueError, with nothing changed, if positive or more than every layer can restore exactly.
        """
        # A layer that was never used has nothing to crop, e.g. when a draft model runs only the first layers
        layers = [layer for layer in self.layers if layer.is_initialized] or self.layers
        min(layers, key=lambda layer: layer.croppable_tokens()).check_crop(tokens_to_remove)
        for layer in layers:
            layer.crop(tokens_to_remove)

    def shift_rows(self, amounts: Sequence[int], global_amounts: Sequence[int] | None = None) -> None:
        """Removes the last `amounts[i]` tokens of batch row i, so that every row still ends in the last slot.

        As many slots ahead of the row hold nothing of it afterwards: the attention mask has to hide them. Exact for
        rows that lose no more than `max_rollback` tokens together with `crop`, and gain more before they lose again.

        Args:
            global_amounts: another number in global layers, where moving a row costs as much as its context is long.
        """
        for layer in self.layers:
            is_global = isinstance(layer, GlobalCacheLayer)
            layer.shift_rows(global_amounts if is_global and global_amounts is not None else amounts)

    def align_rows(self, ends: Sequence[int], length: int) -> None:
        """Moves batch row i, which ends in the last slot, so that it ends before slot `ends[i]` of `length` slots.

        The inverse of what `shift_rows` added up to; the slots behind a row hold nothing, masks have to hide them.
        """
        for layer in self.layers:
            layer.align_rows(ends, length)

    def snapshot(self) -> CacheSnapshot:
        """Remembers the present state; costs a copy of the sliding windows only. Any number of restores may follow."""
        return CacheSnapshot(
            self.config_fields, self.global_dtype, tuple(layer.snapshot_state() for layer in self.layers)
        )

    def restore(self, snapshot: CacheSnapshot) -> None:
        """Goes back to `snapshot`; ValueError if it was taken with another config or global_dtype."""
        _check_fields(self.config_fields, snapshot.config_fields, "snapshot")
        if snapshot.global_dtype != self.global_dtype:
            raise ValueError(f"snapshot: global_dtype expected {self.global_dtype}, got {snapshot.global_dtype}")
        for layer, state in zip(self.layers, snapshot.layer_states):
            layer.restore_state(state)

    def fork(self) -> "HybridCache":
        """An independent cache in the same state. Global storage is shared until the fork writes and then copied."""
        child = copy.copy(self)
        child.layers = child._new_layers()
        child.restore(self.snapshot())
        return child

    def nbytes(self) -> dict[str, int]:
        """Bytes allocated: `full_attention`, `sliding_attention`, `total`; what a fork shares counts in both."""
        sizes = {"full_attention": 0, "sliding_attention": 0}
        for layer_type, layer in zip(self.config_fields["layer_types"], self.layers):
            sizes[layer_type] += sum(buffer.nbytes for buffer in layer.buffers)
        return {**sizes, "total": sum(sizes.values())}

    def save(self, path: str | os.PathLike) -> None:
        """Writes the cache as safetensors to `path + ".partial"`, then renames it to `path`."""
        tensors = {
            f"layers.{index}.{part}": rows.cpu().contiguous()
            for index, layer in enumerate(self.layers)
            if layer.total > 0
            for part, rows in enumerate(layer.live_rows())
        }
        metadata = {
            "format": _FILE_FORMAT,
            "fingerprint": self.fingerprint,
            "config": _canonical_json(self.config_fields),
            "totals": json.dumps([layer.total for layer in self.layers]),
            "max_rollback": str(self.max_rollback),
            "global_dtype": str(self.global_dtype),
            "offload_global": str(self.offload_global),
        }
        partial = os.fspath(path) + ".partial"
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike, config: Any, device: torch.device | str | None = None) -> "HybridCache":
        """Reads a file that `save` wrote, with the options of the saved cache.

        `device=None` reads to the CPU; the first `update` of each layer moves its storage to where the states are.
        Raises FileNotFoundError, or ValueError for a damaged file or one made for another config.
        """
        try:
            with safe_open(path, framework="pt") as file, _storage_mode():
                return cls._from_file(file, path, config, device or "cpu")
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a complete HybridCache file, got {error}") from error

    @classmethod
    def _from_file(cls, file: Any, path: Any, config: Any, device: torch.device | str) -> "HybridCache":
        metadata = file.metadata() or {}
        if metadata.get("format") != _FILE_FORMAT:
            raise ValueError(f"{path}: format expected {_FILE_FORMAT}, got {metadata.get('format')}")
        if metadata["fingerprint"] != cache_fingerprint(config):
            source = f"{path}: fingerprint expected {cache_fingerprint(config)}, got {metadata['fingerprint']}: it"
            _check_fields(json.loads(_canonical_json(_config_fields(config))), json.loads(metadata["config"]), source)
        dtypes = {str(dtype): dtype for dtype in (None, *_FP8_DTYPES)}
        cache = cls(
            config,
            max_rollback=int(metadata["max_rollback"]),
            global_dtype=dtypes[metadata["global_dtype"]],
            offload_global=metadata["offload_global"] == "True",
        )
        for index, (layer, total) in enumerate(zip(cache.layers, json.loads(metadata["totals"]), strict=True)):
            parts = 4 if cache.global_dtype is not None and not layer.is_sliding else 2
            rows = [file.get_tensor(f"layers.{index}.{part}") for part in range(parts if total else 0)]
            if not (cache.offload_global and not layer.is_sliding):
                rows = [part.to(device) for part in rows]
            layer.load_rows(rows, total)
        return cache


__all__ = ["CacheSnapshot", "GlobalCacheLayer", "HybridCache", "SlidingCacheLayer", "cache_fingerprint"]
