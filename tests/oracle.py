"""Native Sparse Attention as plain loops in float64 NumPy: the judge of every implementation.

Written from the rules of the design alone (numbered in the docstrings below), sharing no code with `nsa_jax`. Every set
of tokens that a query reads is a list built by asking one question of each token: slow, and to be checked by reading.

`query_start` and `window_start` are an int or an int array [B]; `segment_ids` is None or [B, S].
The letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H and V head sizes, C compressed
tokens, M blocks, A selected blocks, L window keys.
"""

from typing import NamedTuple

import numpy as np


class Pair(NamedTuple):
    """Keys and values of one branch; any pair of arrays will do in its place."""

    key: np.ndarray
    value: np.ndarray


class Branches(NamedTuple):
    """The outputs of the three branches before gating, each [B, T, N, V]."""

    compressed: np.ndarray
    selected: np.ndarray
    window: np.ndarray


class Gradients(NamedTuple):
    """What `gradients` returns: a cotangent for every differentiable input, in the input's shape."""

    query: np.ndarray
    compressed: Pair
    selected: Pair
    window: Pair
    gates: np.ndarray


# What a query may read: one function a rule.


def visible_compressed(position, segments, num_compressed, config):
    """Rules 3 and 9: those that end by the query, and whose first and last tokens are of its segment."""
    own = segment_at(segments, position)
    visible = []
    for i in range(num_compressed):
        first = i * config.compress_stride
        last = first + config.compress_block - 1
        if last <= position and segments[first] == own and segments[last] == own:
            visible.append(i)
    return visible


def candidate_blocks(position, segments, config):
    """Rules 5 and 9: blocks from the one with the first token of the query's segment to the one with the query."""
    own = segment_at(segments, position)
    start = min(s for s in range(len(segments)) if segments[s] == own)
    candidates = []
    for j in range(count_blocks(len(segments), config)):
        if j >= start // config.select_block and j * config.select_block <= position:
            candidates.append(j)
    return candidates


def selected_tokens(position, segments, blocks, config):
    """Rules 6 and 9: tokens of the query's own segment in the chosen blocks, up to the query."""
    own = segment_at(segments, position)
    tokens = []
    for s in range(len(segments)):
        if s // config.select_block in blocks and s <= position and segments[s] == own:
            tokens.append(s)
    return tokens


def window_rows(position, segments, num_rows, window_start, config):
    """Rules 7, 8 and 9: rows of the window's keys that stand at `position - window + 1 .. position`."""
    own = segment_at(segments, position)
    rows = []
    for row in range(num_rows):
        s = window_start + row
        if s < 0 or s > position or s < position - config.window + 1:
            continue
        if segment_at(segments, s) == own:
            rows.append(row)
    return rows


def segment_at(segments, position):
    """The segment of a position. Outputs past the last key are unspecified; there it is the last key's."""
    return segments[min(position, len(segments) - 1)]


def shared_units(i, j, config):
    """Rule 4: how many units of `compress_stride` tokens compressed token i and block j share."""
    first = i * config.compress_stride
    in_compressed = set(range(first, first + config.compress_block))
    in_block = set(range(j * config.select_block, (j + 1) * config.select_block))
    return len(in_compressed & in_block) / config.compress_stride


# The operations.


def count_compressed(num_keys, config):
    return max(0, (num_keys - config.compress_block) // config.compress_stride + 1)


def count_blocks(num_keys, config):
    return -(-num_keys // config.select_block)


def mean_compress(key, config):
    """Rule 2 with phi the mean: [B, S, K, H] -> [B, C, K, H]."""
    key = np.asarray(key, np.float64)
    B, S, K, H = key.shape
    out = np.zeros((B, count_compressed(S, config), K, H))
    for i in range(out.shape[1]):
        for s in range(i * config.compress_stride, i * config.compress_stride + config.compress_block):
            out[:, i] += key[:, s] / config.compress_block
    return out


def importance(query, compressed_key, *, config, num_keys, scale=None, query_start=0, segment_ids=None):
    """Rule 4: the score of every block, summed over the heads of the group, [B, T, K, M]; 0 where nothing is seen."""
    query, compressed_key = np.asarray(query, np.float64), np.asarray(compressed_key, np.float64)
    B, T, N, H = query.shape
    C, K = compressed_key.shape[1:3]
    M = count_blocks(num_keys, config)
    scale = H**-0.5 if scale is None else scale
    segment_ids, query_start = fill_segments(segment_ids, B, num_keys), per_row(query_start, B)
    share = np.array([[shared_units(i, j, config) for j in range(M)] for i in range(C)]).reshape(C, M)

    scores = np.zeros((B, T, K, M))
    for b in range(B):
        for r in range(T):
            visible = visible_compressed(query_start[b] + r, segment_ids[b], C, config)
            for n in range(N):
                k = n // (N // K)
                p = softmax(scale * compressed_key[b, visible, k] @ query[b, r, n])
                for i, p_i in zip(visible, p, strict=True):
                    scores[b, r, k] += p_i * share[i]
    return scores


def select_blocks(query, compressed_key, *, config, num_keys, scale=None, query_start=0, segment_ids=None):
    """Rule 5: the blocks that each query and group of heads reads, int32 [B, T, K, A], ascending, -1 last."""
    scores = importance(
        query,
        compressed_key,
        config=config,
        num_keys=num_keys,
        scale=scale,
        query_start=query_start,
        segment_ids=segment_ids,
    )
    B, T, K, _ = scores.shape
    segment_ids, query_start = fill_segments(segment_ids, B, num_keys), per_row(query_start, B)

    blocks = np.full((B, T, K, config.num_selected), -1, np.int32)
    for b in range(B):
        for r in range(T):
            candidates = candidate_blocks(query_start[b] + r, segment_ids[b], config)
            for k in range(K):
                chosen = choose(candidates, scores[b, r, k], config)
                blocks[b, r, k, : len(chosen)] = chosen
    return blocks


def choose(candidates, scores, config):
    """Rule 5 for one query: forced blocks first, then the best of the rest, ties to the lower index; ascending."""
    initial = candidates[: config.num_initial]
    local = candidates[max(0, len(candidates) - config.num_local) :]
    forced = set(initial) | set(local)
    ranked = sorted((j for j in candidates if j not in forced), key=lambda j: (-scores[j], j))
    return sorted(forced | set(ranked[: config.num_selected - len(forced)]))


def canonical_blocks(selected_blocks, *, config, num_keys, query_start=0, segment_ids=None):
    """Rule 5, last sentence: a caller's blocks, each at most once, only those that can be read, ascending, -1 last."""
    selected_blocks = np.asarray(selected_blocks)
    B, T, K, _ = selected_blocks.shape
    segment_ids, query_start = fill_segments(segment_ids, B, num_keys), per_row(query_start, B)

    blocks = np.full(selected_blocks.shape, -1, np.int32)
    for b in range(B):
        for r in range(T):
            candidates = candidate_blocks(query_start[b] + r, segment_ids[b], config)
            for k in range(K):
                kept = [j for j in candidates if j in selected_blocks[b, r, k]]
                blocks[b, r, k, : len(kept)] = kept
    return blocks


def attention(
    query,
    compressed,
    selected,
    window,
    gates,
    *,
    config,
    scale=None,
    query_start=0,
    window_start=0,
    segment_ids=None,
    selected_blocks=None,
    branches=False,
):
    """Rules 1, 3, 6 and 7: the gated sum [B, T, N, V]; with `branches`, the three outputs before gating instead."""
    problem = Problem(
        query,
        compressed,
        selected,
        window,
        gates,
        config,
        scale,
        query_start,
        window_start,
        segment_ids,
        selected_blocks,
    )
    outputs = np.zeros((3, *problem.out_shape))
    for b, r, n in np.ndindex(problem.out_shape[:3]):
        for branch, pair in enumerate(problem.pairs):
            seen = problem.seen(branch, b, r, n)
            _, outputs[branch, b, r, n] = problem.attend(pair, b, r, n, seen)
    if branches:
        return Branches(*outputs)
    return sum(problem.gates[..., branch, None] * outputs[branch] for branch in range(3))


def gradients(
    query,
    compressed,
    selected,
    window,
    gates,
    cotangent,
    *,
    config,
    scale=None,
    query_start=0,
    window_start=0,
    segment_ids=None,
    selected_blocks=None,
):
    """The gradients of `sum(attention(...) * cotangent)`; the selection has none."""
    problem = Problem(
        query,
        compressed,
        selected,
        window,
        gates,
        config,
        scale,
        query_start,
        window_start,
        segment_ids,
        selected_blocks,
    )
    cotangent = np.asarray(cotangent, np.float64)
    dquery, dgates = np.zeros_like(problem.query), np.zeros_like(problem.gates)
    dpairs = [Pair(np.zeros_like(pair.key), np.zeros_like(pair.value)) for pair in problem.pairs]

    for b, r, n in np.ndindex(problem.out_shape[:3]):
        k = n // problem.group
        for branch, (pair, dpair) in enumerate(zip(problem.pairs, dpairs, strict=True)):
            seen = problem.seen(branch, b, r, n)
            p, out = problem.attend(pair, b, r, n, seen)
            dgates[b, r, n, branch] = cotangent[b, r, n] @ out
            dout = problem.gates[b, r, n, branch] * cotangent[b, r, n]
            dp = pair.value[b, seen, k] @ dout
            dscores = problem.scale * p * (dp - p @ dp)
            dquery[b, r, n] += dscores @ pair.key[b, seen, k]
            # No token is listed twice in `seen`, so that nothing is lost by adding in place.
            dpair.key[b, seen, k] += np.outer(dscores, problem.query[b, r, n])
            dpair.value[b, seen, k] += np.outer(p, dout)
    return Gradients(dquery, *dpairs, dgates)


def finite_difference(function, arrays, cotangent, *, name, index, step=1e-5):
    """d sum(function(**arrays) * cotangent) / d arrays[name][index], by central difference."""
    sums = []
    for sign in (1, -1):
        moved = {key: np.array(value, np.float64) for key, value in arrays.items()}
        moved[name][index] += sign * step
        sums.append(np.sum(function(**moved) * cotangent))
    return (sums[0] - sums[1]) / (2 * step)


class Problem:
    """The arguments of `attention` in float64, and what each query sees and computes in each branch."""

    def __init__(
        self,
        query,
        compressed,
        selected,
        window,
        gates,
        config,
        scale,
        query_start,
        window_start,
        segment_ids,
        selected_blocks,
    ):
        self.query, self.gates = np.asarray(query, np.float64), np.asarray(gates, np.float64)
        self.pairs = [
            Pair(*(np.asarray(array, np.float64) for array in pair)) for pair in (compressed, selected, window)
        ]
        B, T, N, H = self.query.shape
        S, K = self.pairs[1].key.shape[1:3]
        self.group = N // K
        self.out_shape = (B, T, N, self.pairs[1].value.shape[-1])
        self.scale = H**-0.5 if scale is None else scale
        query_start, window_start = per_row(query_start, B), per_row(window_start, B)
        segments = fill_segments(segment_ids, B, S)
        arguments = {"config": config, "num_keys": S, "query_start": query_start, "segment_ids": segment_ids}
        if selected_blocks is None:
            blocks = select_blocks(self.query, self.pairs[0].key, scale=self.scale, **arguments)
        else:
            blocks = canonical_blocks(selected_blocks, **arguments)

        # What is seen in the compressed and window branches is the same for all heads, so it is listed once.
        self._seen = {}
        for b, r in np.ndindex(B, T):
            position = query_start[b] + r
            cmp = visible_compressed(position, segments[b], self.pairs[0].key.shape[1], config)
            win = window_rows(position, segments[b], self.pairs[2].key.shape[1], window_start[b], config)
            for k in range(K):
                slc = selected_tokens(position, segments[b], set(blocks[b, r, k].tolist()), config)
                self._seen[b, r, k] = (cmp, slc, win)

    def seen(self, branch, b, r, n):
        return self._seen[b, r, n // self.group][branch]

    def attend(self, pair, b, r, n, seen):
        """Weights over `seen`, and the output: 0 where nothing is seen."""
        k = n // self.group
        p = softmax(self.scale * pair.key[b, seen, k] @ self.query[b, r, n])
        return p, p @ pair.value[b, seen, k]


def softmax(scores):
    if len(scores) == 0:
        return scores
    weights = np.exp(scores - np.max(scores))
    return weights / np.sum(weights)


def per_row(start, batch):
    return [int(s) for s in np.broadcast_to(np.asarray(start), (batch,))]


def fill_segments(segment_ids, batch, num_keys):
    return [[0] * num_keys] * batch if segment_ids is None else np.asarray(segment_ids).tolist()
