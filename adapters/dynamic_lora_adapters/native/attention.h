// Attention of new tokens over the KV cache, one token at a time, in float32; keys and values are
// cached in that, or in bfloat16 and widened as they are read.
//
// They are read where they lie. Each (token, some KV heads) pair is one item of work: its cached
// keys, and then its values, are gone through block by block, all its heads in each, so that
// memory is read in order.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bfloat16.h"
#include "room.h"
#include "team.h"
#include "vectors.h"

namespace dynamic_lora {

constexpr int kMaxHeads = 4;   // query heads scored together: their sums stay in registers
constexpr int kScored = 4;     // cached tokens that are scored together, as far as registers go
constexpr int kValueVecs = 4;  // vectors of the value's width that are summed together
constexpr int64_t kBlockTokens = 16;  // cached tokens in a block, while which the next is asked for
constexpr int64_t kManyItems = 8;  // from so many tokens on there is work enough for all threads

// How one layer attends. Cached is what keys and values are kept in: float or BFloat16.
template <typename Cached>
struct Attention {
  const float* q;        // [heads, tokens, dim]
  const Cached* keys;    // [cells, kv_heads, dim]
  const Cached* values;  // [cells, kv_heads, value_dim]
  float* out;            // [tokens, heads, value_dim]
  const float* sinks;    // [heads] or null
  int64_t q_head, q_token, heads, kv_heads, dim, value_dim;
  float scaling, softcap;
};

// Writes so many values of a new token to the cache.
inline void keep(const float* values, int64_t count, float* cell) {
  std::memcpy(cell, values, count * sizeof(float));
}
inline void keep(const float* values, int64_t count, BFloat16* cell) {
  for (int64_t i = 0; i < count; i++) cell[i] = to_bfloat16(values[i]);
}

// The largest of so many values, a multiple of kLanes; one that is no number may be passed over.
inline float highest(const float* values, int64_t count) {
  Vec top = load(values);
  for (int64_t t = kLanes; t < count; t += kLanes) {
    const Vec next = load(values + t);
    top = next > top ? next : top;
  }
  float found = top[0];
  UNROLL
  for (int lane = 1; lane < kLanes; lane++) found = std::max(found, top[lane]);
  return found;
}

// Turns scores into weights that are not yet divided by their sum; returns the sum.
template <typename Cached>
float soften(float* scores, int64_t count, int64_t padded, const Attention<Cached>& layer,
             int64_t head) {
  if (layer.softcap > 0)
    for (int64_t t = 0; t < count; t++)
      scores[t] = layer.softcap * std::tanh(scores[t] / layer.softcap);
  for (int64_t t = count; t < padded; t++) scores[t] = -INFINITY;
  float top = highest(scores, padded);
  if (layer.sinks) top = std::max(top, layer.sinks[head]);
  Vec total{};
  for (int64_t t = 0; t < padded; t += kLanes) {
    const Vec weight = exp_negative(load(scores + t) - top);
    store(scores + t, weight);
    total += weight;
  }
  return sum(total) + (layer.sinks ? std::exp(layer.sinks[head] - top) : 0.0f);
}

// Asks for what is read a block later, `ahead` elements further on, once for each of its lines.
template <typename Cached>
inline void ask_block(const Cached* place, int64_t ahead, int64_t offset) {
  if (offset * sizeof(Cached) % kLineBytes == 0) __builtin_prefetch(place + ahead + offset);
}

// Scores of cached tokens [0, Tokens) of `keys` for some heads, whose queries `q` are q_head apart and
// arranged as `arrange_queries` says.
template <int Heads, int Tokens, typename Cached>
inline __attribute__((always_inline)) void score_tokens(const Attention<Cached>& layer,
                                                        const float* q, int64_t q_head,
                                                        const Cached* keys, int64_t padded,
                                                        int64_t ahead, float* scores) {
  const int64_t stride = layer.kv_heads * layer.dim;
  Vec dots[Heads][Tokens];
  begin_sums(true, nullptr, 0, dots);
  const auto add = [&](int64_t d, const auto& read) __attribute__((always_inline)) {
    Vec query[Heads];
    UNROLL
    for (int h = 0; h < Heads; h++) query[h] = held(load(q + h * q_head + d));
    UNROLL
    for (int i = 0; i < Tokens; i++) {
      const Vec part = held(read(keys + i * stride));
      ask_block(keys + i * stride, ahead, d);
      UNROLL
      for (int h = 0; h < Heads; h++) dots[h][i] += part * query[h];
    }
  };
  int64_t d = 0;
  for (; d + 2 * kLanes <= layer.dim; d += 2 * kLanes) {
    add(d, [&](const Cached* key) { return half_of<false>(key + d); });
    add(d + kLanes, [&](const Cached* key) { return half_of<true>(key + d); });
  }
  if (d < layer.dim) add(d, [&](const Cached* key) { return load(key + d); });
  UNROLL
  for (int h = 0; h < Heads; h++) {
    if constexpr (Tokens == kScored) {
      sum_each(dots[h], layer.scaling, scores + h * padded);
    } else {
      UNROLL
      for (int i = 0; i < Tokens; i++) scores[h * padded + i] = sum(dots[h][i]) * layer.scaling;
    }
  }
}

// Scores of `count` cached tokens for some heads that share a KV head.
template <int Heads, typename Cached>
__attribute__((noinline)) void score(const Attention<Cached>& layer, const float* q, int64_t q_head,
                                     const Cached* keys, int64_t count, int64_t padded,
                                     int64_t ahead, float* scores) {
  constexpr int kTokens = kLanes == 8 && Heads > 3 ? kScored / 2 : kScored;
  const int64_t stride = layer.kv_heads * layer.dim;
  int64_t t = 0;
  for (; t + kTokens <= count; t += kTokens)
    score_tokens<Heads, kTokens>(layer, q, q_head, keys + t * stride, padded, ahead, scores + t);
  for (; t < count; t++)
    score_tokens<Heads, 1>(layer, q, q_head, keys + t * stride, padded, ahead, scores + t);
}

// Adds `count` cached values, weighted, to Vecs vectors of each head's sums [Heads, value_dim]; two
// vectors are of the halves of 2 * kLanes values.
template <int Heads, int Vecs, typename Cached>
__attribute__((noinline)) void blend_vecs(const Attention<Cached>& layer, const float* weights,
                                          const Cached* values, int64_t count, int64_t padded,
                                          int64_t ahead, float* sums) {
  const int64_t stride = layer.kv_heads * layer.value_dim;
  Vec blended[Heads][Vecs];
  begin_sums(false, sums, layer.value_dim, blended);
  TileRows<Heads, float> weight(weights, padded);
  for (int64_t t = 0; t < count; t++, weight.go_on(1), values = held(values + stride)) {
    const auto add = [&](int v, Vec part) __attribute__((always_inline)) {
      ask_block(values, ahead, v * kLanes);
      UNROLL
      for (int h = 0; h < Heads; h++) blended[h][v] += *weight.at(h) * part;
    };
    UNROLL
    for (int v = 0; v + 2 <= Vecs; v += 2) {
      add(v, half_of<false>(values + v * kLanes));
      add(v + 1, half_of<true>(values + v * kLanes));
    }
    if constexpr (Vecs % 2) add(Vecs - 1, load(values + (Vecs - 1) * kLanes));
  }
  end_sums(blended, sums, layer.value_dim);
}

// Values that are blended so many at a time, before the others.
inline int64_t blended_together(int64_t value_dim) {
  return value_dim / (kValueVecs * kLanes) * (kValueVecs * kLanes);
}

template <int Heads, typename Cached>
void blend(const Attention<Cached>& layer, const float* weights, const Cached* values,
           int64_t count, int64_t padded, int64_t ahead, float* sums) {
  const int64_t together = blended_together(layer.value_dim);
  int64_t d = 0;
  for (; d < together; d += kValueVecs * kLanes)
    blend_vecs<Heads, kValueVecs>(layer, weights, values + d, count, padded, ahead, sums + d);
  for (; d < layer.value_dim; d += kLanes)
    blend_vecs<Heads, 1>(layer, weights, values + d, count, padded, ahead, sums + d);
}

// Queries [heads, dim] as the keys are read: where these are in pairs, every second number of
// 2 * kLanes, and then the others.
template <typename Cached>
void arrange_queries(const Attention<Cached>& layer, const float* q, int64_t heads, float* to) {
  const int64_t dim = layer.dim;
  for (int64_t h = 0; h < heads; h++, q += layer.q_head, to += dim) {
    int64_t d = 0;
    for (; d + 2 * kLanes <= dim; d += 2 * kLanes) part_pairs(q + d, to + d);
    for (; d < dim; d++) to[d] = q[d];
  }
}

// Divides a head's blended values by what their weights add up to, and puts those in pairs in order.
template <typename Cached>
void finish_values(const Attention<Cached>& layer, float total, float* out) {
  const Vec inverse = all(1.0f / total);
  int64_t d = 0;
  if constexpr (kInPairs<Cached>)
    for (; d < blended_together(layer.value_dim); d += 2 * kLanes)
      join_pairs(load(out + d) * inverse, load(out + d + kLanes) * inverse, out + d);
  for (; d < layer.value_dim; d += kLanes) store(out + d, load(out + d) * inverse);
}

// Calls act(number of heads as a type, first of them) for the query heads that share a KV head.
template <typename Act>
void with_heads(int64_t first, int64_t group, const Act& act) {
  for (int64_t h = 0; h < group;) {
    switch (std::min<int64_t>(group - h, kMaxHeads)) {
      case 4: act(std::integral_constant<int, 4>{}, first + h); h += 4; break;
      case 3: act(std::integral_constant<int, 3>{}, first + h); h += 3; break;
      case 2: act(std::integral_constant<int, 2>{}, first + h); h += 2; break;
      default: act(std::integral_constant<int, 1>{}, first + h); h += 1;
    }
  }
}

// A token, and the cells [cell, cell + count) that it sees.
struct Item {
  int64_t row, cell, count;
};

// Calls act(heads as a type, first of them, KV head, first token, one behind the last), block by
// block. These are of nearly equal size: while a short one is read, little could be asked for.
template <typename Act>
void for_each_block(int64_t count, int64_t group, int64_t from, int64_t to, const Act& act) {
  const RowBlocks blocks((count + kScored - 1) / kScored, kBlockTokens / kScored);
  for (int64_t b = 0; b < blocks.count; b++) {
    const int64_t t = blocks.first(b) * kScored;
    const int64_t stop = std::min(blocks.first(b + 1) * kScored, count);
    for (int64_t kv = from; kv < to; kv++)
      with_heads(kv * group, group, [&](auto num_heads, int64_t head) {
        act(num_heads, head, kv, t, stop);
      });
  }
}

// Numbers that `attend` keeps meanwhile: scores of cached tokens for each query head, their sums, and
// queries.
template <typename Cached>
int64_t attend_numbers(const Attention<Cached>& layer, const Item& item, int64_t kv_heads) {
  const int64_t padded = (item.count + kLanes - 1) / kLanes * kLanes;
  return kv_heads * (layer.heads / layer.kv_heads) * (padded + 1 + layer.dim);
}

// Attends with one token under KV heads [from, to). `find_next` says which keys are read behind it:
// they are asked for while its last values are read. `scratch` has room for `attend_numbers`.
template <typename Cached, typename FindNext>
void attend(const Attention<Cached>& layer, const Item& item, int64_t from, int64_t to,
            const FindNext& find_next, float* scratch) {
  const int64_t count = item.count, padded = (count + kLanes - 1) / kLanes * kLanes;
  const int64_t group = layer.heads / layer.kv_heads, first = from * group;
  const int64_t heads = (to - from) * group, width = layer.value_dim;
  const float* q = layer.q + item.row * layer.q_token + first * layer.q_head;
  int64_t q_head = layer.q_head;
  float* totals = scratch + heads * padded;
  if constexpr (kInPairs<Cached>) {
    float* arranged = totals + heads;
    arrange_queries(layer, q, heads, arranged);
    q = arranged, q_head = layer.dim;
  }
  float* out = layer.out + (item.row * layer.heads + first) * width;
  const Cached* values_of_first = layer.values + item.cell * layer.kv_heads * width;
  const auto scores = [&](int64_t head) { return scratch + (head - first) * padded; };
  for_each_block(count, group, from, to, [&](auto num_heads, int64_t head, int64_t kv, int64_t t,
                                             int64_t stop) {
    const Cached* keys = layer.keys + ((item.cell + t) * layer.kv_heads + kv) * layer.dim;
    const int64_t ahead = stop < count ? (stop - t) * layer.kv_heads * layer.dim
                                       : values_of_first + kv * width - keys;
    score<num_heads()>(layer, q + (head - first) * q_head, q_head, keys, stop - t, padded, ahead,
                       scores(head) + t);
  });
  for (int64_t head = first; head < first + heads; head++)
    totals[head - first] = soften(scores(head), count, padded, layer, head);
  std::memset(out, 0, heads * width * sizeof(float));
  const Cached* next = find_next();
  for_each_block(count, group, from, to, [&](auto num_heads, int64_t head, int64_t kv, int64_t t,
                                             int64_t stop) {
    const Cached* values = values_of_first + (t * layer.kv_heads + kv) * width;
    const int64_t ahead = stop < count ? (stop - t) * layer.kv_heads * width
                                       : next + (kv - from) * layer.dim - values;
    blend<num_heads()>(layer, scores(head) + t, values, stop - t, padded, ahead,
                       out + (head - first) * width);
  });
  for (int64_t h = 0; h < heads; h++) finish_values(layer, totals[h], out + h * width);
}

// Whether one thread reads all KV heads of a token, which lie side by side: where there is work enough.
inline bool attends_whole_rows(int64_t num_items) { return num_items >= kManyItems; }

// Works that threads claim one by one. A thread claims its next one while it has one at hand: so it
// knows what to ask for.
struct Claims {
  std::atomic<int64_t> next{0};

  int64_t claim() { return next.fetch_add(1, std::memory_order_relaxed); }
};

// A thread that attends with a token, or with some of its heads, calls `begin` with its row before
// it does, and then `end`. Where `memory` runs out, some rows are not written. Called by a whole
// team of threads, with claims of which none was made.
template <typename Cached, typename Begin, typename End>
void share_attention(const Attention<Cached>& layer, const Item* items, int64_t num_items,
                     Claims& claims, Memory& memory, const Begin& begin, const End& end) {
  static thread_local std::vector<float> scratch;
  const int64_t together = attends_whole_rows(num_items) ? layer.kv_heads : 1;
  const int64_t parts = layer.kv_heads / together, works = num_items * parts;
  const auto item_of = [&](int64_t work) -> const Item& { return items[work / parts]; };
  const auto kv_of = [&](int64_t work) { return work % parts * together; };
  for (int64_t work = claims.claim(), next; work < works; work = next) {
    const auto find_next = [&] {
      next = claims.claim();
      const int64_t known = std::min(next, works - 1);
      return layer.keys + (item_of(known).cell * layer.kv_heads + kv_of(known)) * layer.dim;
    };
    const Item& item = item_of(work);
    begin(item.row);
    if (memory.suffices([&] { have_room(scratch, attend_numbers(layer, item, together)); }))
      attend(layer, item, kv_of(work), kv_of(work) + together, find_next, scratch.data());
    else
      find_next();
    end(item.row);
  }
  meet();
}

}  // namespace dynamic_lora
