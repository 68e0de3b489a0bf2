// Attention of new tokens over the KV cache, one token at a time, in float32.
//
// Keys and values are read where they lie. Each (token, KV head) pair is one
// item of work: the query heads that share the KV head are scored against the
// cached keys in one pass over them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace dynamic_lora {

constexpr int kMaxHeads = 4;     // query heads scored together: their sums stay in registers
constexpr int kScored = 4;       // cached tokens that are scored together, as far as registers go
constexpr int kValueVecs = 4;    // vectors of the value's width that are summed together
constexpr int kTokensAhead = 8;  // how far ahead keys and values are asked for
constexpr int kLine = kLineBytes / sizeof(float);
constexpr int64_t kManyItems = 8;  // from so many tokens on there is work enough for all threads

struct Attention {
  const float* q;       // [heads, tokens, dim]
  const float* keys;    // [cells, kv_heads, dim]
  const float* values;  // [cells, kv_heads, value_dim]
  float* out;           // [tokens, heads, value_dim]
  const float* sinks;   // [heads] or null
  int64_t q_head, q_token, heads, kv_heads, dim, value_dim;
  float scaling, softcap;
};

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
inline float soften(float* scores, int64_t count, int64_t padded, const Attention& layer, int64_t head) {
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

// Scores of tokens [t, t + Tokens).
template <int Heads, int Tokens>
void score_tokens(const Attention& layer, const float* q, const float* keys, int64_t t,
                  int64_t padded, float* scores) {
  const int64_t stride = layer.kv_heads * layer.dim;
  const float* key = keys + t * stride;
  Vec dots[Heads][Tokens];
  UNROLL
  for (int h = 0; h < Heads; h++) {
    UNROLL
    for (int i = 0; i < Tokens; i++) dots[h][i] = Vec{};
  }
  for (int64_t d = 0; d < layer.dim; d += kLanes) {
    Vec query[Heads];
    UNROLL
    for (int h = 0; h < Heads; h++) query[h] = held(load(q + h * layer.q_head + d));
    UNROLL
    for (int i = 0; i < Tokens; i++) {
      const Vec part = held(load(key + i * stride + d));
      if (d % kLine == 0) __builtin_prefetch(key + (i + kTokensAhead) * stride + d);
      UNROLL
      for (int h = 0; h < Heads; h++) dots[h][i] += part * query[h];
    }
  }
  UNROLL
  for (int h = 0; h < Heads; h++) {
    if constexpr (Tokens == kScored) {
      sum_each(dots[h], layer.scaling, scores + h * padded + t);
    } else {
      UNROLL
      for (int i = 0; i < Tokens; i++) scores[h * padded + t + i] = sum(dots[h][i]) * layer.scaling;
    }
  }
}

template <int Heads>
void score(const Attention& layer, const float* q, const float* keys, int64_t count, int64_t padded,
           float* scores) {
  constexpr int kTokens = kLanes == 8 && Heads > 3 ? kScored / 2 : kScored;
  int64_t t = 0;
  for (; t + kTokens <= count; t += kTokens)
    score_tokens<Heads, kTokens>(layer, q, keys, t, padded, scores);
  for (; t < count; t++) score_tokens<Heads, 1>(layer, q, keys, t, padded, scores);
}

template <int Heads, int Vecs>
void blend(const Attention& layer, const float* weights, const float* values, int64_t count,
           int64_t padded, const float* totals, float* out) {
  const int64_t stride = layer.kv_heads * layer.value_dim;
  Vec blended[Heads][Vecs] = {};
  for (int64_t t = 0; t < count; t++)
    UNROLL
    for (int v = 0; v < Vecs; v++) {
      const Vec part = load(values + t * stride + v * kLanes);
      if (v * kLanes % kLine == 0)
        __builtin_prefetch(values + (t + kTokensAhead) * stride + v * kLanes);
      UNROLL
      for (int h = 0; h < Heads; h++) blended[h][v] += weights[h * padded + t] * part;
    }
  UNROLL
  for (int h = 0; h < Heads; h++)
    UNROLL
    for (int v = 0; v < Vecs; v++)
      store(out + h * layer.value_dim + v * kLanes, blended[h][v] / totals[h]);
}

template <int Heads>
void attend(const Attention& layer, int64_t row, int64_t first_cell, int64_t count, int64_t head,
            int64_t kv_head, std::vector<float>& scratch) {
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  if (static_cast<int64_t>(scratch.size()) < Heads * padded) scratch.resize(Heads * padded);
  float* scores = scratch.data();
  const float* q = layer.q + head * layer.q_head + row * layer.q_token;
  const float* keys = layer.keys + (first_cell * layer.kv_heads + kv_head) * layer.dim;
  const float* values = layer.values + (first_cell * layer.kv_heads + kv_head) * layer.value_dim;
  float* out = layer.out + (row * layer.heads + head) * layer.value_dim;
  score<Heads>(layer, q, keys, count, padded, scores);
  float totals[Heads];
  UNROLL
  for (int h = 0; h < Heads; h++)
    totals[h] = soften(scores + h * padded, count, padded, layer, head + h);
  int64_t d = 0;
  for (; d + kValueVecs * kLanes <= layer.value_dim; d += kValueVecs * kLanes)
    blend<Heads, kValueVecs>(layer, scores, values + d, count, padded, totals, out + d);
  for (; d < layer.value_dim; d += kLanes)
    blend<Heads, 1>(layer, scores, values + d, count, padded, totals, out + d);
}

// items [num_items][3]: row of the token, first cell it sees, number of cells it sees.
// Called by a whole team of threads.
inline void share_attention(const Attention& layer, const int64_t* items, int64_t num_items) {
  static thread_local std::vector<float> scratch;
  const int64_t group = layer.heads / layer.kv_heads;
  // KV heads of one token lie side by side: where there is work enough, one thread reads them all.
  const int64_t chunk = num_items >= kManyItems ? layer.kv_heads : 1;
#pragma omp for schedule(dynamic, chunk)
  for (int64_t work = 0; work < num_items * layer.kv_heads; work++) {
    const int64_t* item = items + work / layer.kv_heads * 3;
    const int64_t kv_head = work % layer.kv_heads;
    for (int64_t h = 0; h < group;) {
      const int64_t head = kv_head * group + h;
      switch (std::min<int64_t>(group - h, kMaxHeads)) {
        case 4: attend<4>(layer, item[0], item[1], item[2], head, kv_head, scratch); h += 4; break;
        case 3: attend<3>(layer, item[0], item[1], item[2], head, kv_head, scratch); h += 3; break;
        case 2: attend<2>(layer, item[0], item[1], item[2], head, kv_head, scratch); h += 2; break;
        default: attend<1>(layer, item[0], item[1], item[2], head, kv_head, scratch); h += 1;
      }
    }
  }
}

}  // namespace dynamic_lora
