// Random draws from rows of logits: temperature, top-k, top-p, min-p, and the Gumbel-max trick.
//
// A token's noise is a hash of the draw's key and the token's column (SplitMix64: Steele, Lea and
// Flood 2014), the numbers of the server's `engine/sampling/noise.py`. Two logarithms for each token of the
// vocabulary would cost more than all else here: a bound of the noise comes of the hash's bits
// alone, and only tokens that could win by it have theirs computed. Nothing is sorted either: what
// top-p keeps is found by halving.

#include <vector>

#include "room.h"
#include "scan.h"

using namespace dynamic_lora;

namespace {

constexpr uint64_t kGamma = 0x9e3779b97f4a7c15;
constexpr int kUniformBits = 40;
constexpr float kBelowOne = 1 - 0x1p-24f;
constexpr float kLog2 = 0.693147181f;
constexpr int kTogether = 64;  // tokens whose noise is bounded before they are looked at
// Tokens lighter than this beside the heaviest are looked at only if the others do not suffice.
constexpr float kLight[] = {0.1f, 1e-2f, 1e-3f, 1e-5f, 0.0f};

struct Draw {
  int64_t row;
  uint64_t key;
  int64_t top_k;  // 0: off
  float temperature, top_p, min_p;

  bool filters() const { return top_k > 0 || top_p < 1 || min_p > 0; }
};

inline uint64_t noise_bits(uint64_t key, int64_t column) {
  uint64_t bits = key + kGamma * static_cast<uint64_t>(column + 1);
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111eb;
  return bits ^ (bits >> 31);
}

// Standard Gumbel noise, -log(-log(1 - u)).
inline float gumbel(uint64_t bits) {
  const float uniform = static_cast<float>(bits >> (64 - kUniformBits)) * 0x1p-40f + 0x1p-41f;
  return -std::log(-std::log1p(-std::min(uniform, kBelowOne)));
}

// At least as much as `gumbel`, within a tenth where that is large: -log(u) is no less, and the
// bits of a float, as a whole number, are a lower bound of its logarithm to base two.
inline float gumbel_bound(uint64_t bits) {
  const float leading = static_cast<float>(static_cast<int32_t>(bits >> 33));  // u * 2^31
  int32_t exponent;
  std::memcpy(&exponent, &leading, sizeof exponent);
  constexpr float kRounding = 1e-3f;
  return ((127 + 31) * kLog2 + kRounding) - static_cast<float>(exponent) * (kLog2 * 0x1p-23f);
}

// The token that wins so far; of equal ones the first.
struct Winner {
  float total = -INFINITY;
  int64_t column = 0;

  void consider(float score, uint64_t key, int64_t candidate) {
    const uint64_t bits = noise_bits(key, candidate);
    if (score + gumbel_bound(bits) < total) return;
    const float sum = score + gumbel(bits);
    if (sum > total || (sum == total && candidate < column)) total = sum, column = candidate;
  }
};

// A row's scores by its temperature, as far as a vector goes; -inf past the row's end.
inline Vec scaled(const Draw& draw, const float* row, int64_t at, int64_t width) {
  return part(row, at, width) / all(draw.temperature);
}

int64_t draw_of_all(const Draw& draw, const float* row, int64_t width) {
  Winner winner;
  for (int64_t first = 0; first < width; first += kTogether) {
    alignas(64) float bounds[kTogether], scores[kTogether];
    for (int i = 0; i < kTogether; i++) bounds[i] = gumbel_bound(noise_bits(draw.key, first + i));
    IntVec reaches{};
    for (int i = 0; i < kTogether; i += kLanes) {
      const Vec values = scaled(draw, row, first + i, width);
      store(scores + i, values);
      reaches |= values + load(bounds + i) > winner.total;
    }
    if (!any(reaches)) continue;
    const int64_t count = std::min<int64_t>(kTogether, width - first);
    for (int64_t i = 0; i < count; i++) winner.consider(scores[i], draw.key, first + i);
  }
  return winner.column;
}

struct Token {
  float score, weight;  // the logit by the temperature, and e^(score - the highest)
  int64_t column;
};

bool precedes(const Token& one, const Token& other) {
  return one.score > other.score || (one.score == other.score && one.column < other.column);
}

// How many of the tokens, in order, weigh `wanted` together; all, if they weigh less. As many of
// them are at the beginning then.
size_t count_weighing(std::vector<Token>& tokens, double wanted) {
  size_t first = 0, last = tokens.size();
  while (first < last) {
    const size_t middle = first + (last - first) / 2;
    std::nth_element(tokens.begin() + first, tokens.begin() + middle, tokens.begin() + last,
                     precedes);
    double heavier = 0;
    for (size_t i = first; i <= middle; i++) heavier += tokens[i].weight;
    if (heavier < wanted)
      wanted -= heavier, first = middle + 1;
    else
      last = middle;
  }
  return std::min(first + 1, tokens.size());
}

double weight_of(const std::vector<Token>& tokens) {
  double total = 0;
  for (const Token& token : tokens) total += token.weight;
  return total;
}

// One thread's room for a row and its tokens.
struct Filter {
  std::vector<float> scores, weights;
  std::vector<Token> tokens;

  // The tokens that weigh so much at least.
  void take(int64_t width, float least) {
    tokens.clear();
    for (int64_t at = 0; at < width; at += kLanes) {
      if (!any(load(&weights[at]) >= least)) continue;
      for (int64_t i = at; i < std::min(at + kLanes, width); i++)
        if (weights[i] >= least) tokens.push_back({scores[i], weights[i], i});
    }
  }

  // Whether all that a filter can keep is among the tokens that weigh so much.
  bool suffices(const Draw& draw, float least, double total) const {
    if (draw.top_k > 0) return static_cast<int64_t>(tokens.size()) >= draw.top_k;
    return draw.min_p >= least || (draw.top_p < 1 && weight_of(tokens) >= draw.top_p * total);
  }

  void keep(const Draw& draw, double total) {
    if (draw.top_k > 0 && draw.top_k < static_cast<int64_t>(tokens.size())) {
      std::nth_element(tokens.begin(), tokens.begin() + draw.top_k, tokens.end(), precedes);
      tokens.resize(draw.top_k);
    }
    if (draw.top_k > 0) total = weight_of(tokens);
    if (draw.top_p < 1) tokens.resize(count_weighing(tokens, draw.top_p * total));
  }

  int64_t draw_of_kept(const Draw& draw, const float* row, int64_t width) {
    const int64_t padded = (width + kLanes - 1) / kLanes * kLanes;
    scores.resize(padded);
    weights.resize(padded);
    for (int64_t i = 0; i < width; i += kLanes) store(&scores[i], scaled(draw, row, i, width));
    const float top = highest_of(scores.data(), padded);
    const double total = mass(scores.data(), padded, top, [this](Vec values, int64_t at) {
      store(&weights[at], values);
    });
    for (const float light : kLight) {
      // Without top-k, what is lighter than min-p allows makes no difference.
      const float least = draw.top_k > 0 ? light : std::max(light, draw.min_p);
      take(width, least);
      if (suffices(draw, least, total)) break;
    }
    keep(draw, total);
    Winner winner;
    for (const Token& token : tokens)
      if (token.weight >= draw.min_p) winner.consider(token.score, draw.key, token.column);
    return winner.column;
  }
};

}  // namespace

// Draws from rows of logits [.., width]; tokens [count]. A row with values that are no finite
// numbers has some token. Returns what `Memory` says.
extern "C" int64_t dynamic_lora_draws(const float* logits, int64_t width, const Draw* draws,
                                      int64_t count, int64_t* tokens) {
  Memory memory;
#pragma omp parallel for schedule(dynamic) if (count > 1)
  for (int64_t i = 0; i < count; i++) {
    static thread_local Filter filter;
    const float* row = logits + draws[i].row * width;
    memory.suffices([&] {
      tokens[i] = draws[i].filters() ? filter.draw_of_kept(draws[i], row, width)
                                     : draw_of_all(draws[i], row, width);
    });
  }
  return memory.status();
}
