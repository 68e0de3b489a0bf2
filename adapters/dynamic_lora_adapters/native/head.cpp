// The end of a model, where only the highest logit of each row is wanted, and perhaps how likely that
// makes its token: the last norm, the output head, and a look at what it gives. Nothing is written
// of all these numbers, nor read again.

#include <cmath>
#include <vector>

#include "norm.h"
#include "product.h"
#include "team.h"

using namespace dynamic_lora;

namespace {

struct Head {
  Norm norm;
  Projection base;
};

// The highest output of a row, as far as it is known.
struct Peak {
  float height = -INFINITY;
  int64_t column = 0;
  bool odd = false;

  // Of equal ones the first, as torch has it.
  void consider(float other, int64_t at) {
    if (other > height || (other == height && at < column)) height = other, column = at;
  }

  void consider(const Tops& tops, int64_t row) {
    for (int64_t i = row * kLanes; i < (row + 1) * kLanes; i++) {
      consider(tops.heights[i], tops.columns[i] + i % kLanes);
      odd |= tops.odd[i] != 0;
    }
  }
};

struct Scratch {
  Lines<float> normed;
  InputCopies copies;
  std::vector<Peak> peaks;
  Masses masses;
  Lines<float> tops;  // [rows], and what makes them whole vectors
};

// log sum e^(output - highest) of each row, whose highest are known; no number if one of the row
// is none. Called by a whole team of threads.
void share_log_masses(const Scratch& scratch, int64_t count, int64_t panels, float* log_masses) {
#pragma omp for schedule(static) nowait
  for (int64_t row = 0; row < count; row += kLanes) {
    double totals[kLanes];
    scratch.masses.total(row, panels, scratch.tops.data() + row, totals);
    for (int64_t i = row; i < std::min<int64_t>(row + kLanes, count); i++)
      log_masses[i] = scratch.peaks[i].odd ? NAN : std::log(totals[i - row]);
  }
}

}  // namespace

extern "C" {

// So many more, or fewer, want inputs whole from now on.
void dynamic_lora_keep_inputs_whole(int64_t more) { whole_inputs += more; }

// For rows [count] of hidden [.., k]: where each has its highest output, and whether all of its
// outputs are numbers below infinity, and one above minus infinity; tokens, sound [count]. Where
// `log_masses` [count] are wanted: minus the logarithm of each token's probability.
// Returns what `Memory` says.
int64_t dynamic_lora_highest(const Head* head, const float* hidden, const int64_t* rows,
                             int64_t count, int64_t* tokens, int64_t* sound,
                             float* log_masses) {
  static thread_local Scratch own;
  Scratch& scratch = own;  // of this thread, for the whole team
  const Projection& base = head->base;
  const Batch batch(count);
  const int64_t panels = (base.n + kWidth - 1) / kWidth;
  Memory memory;
  const bool ready = memory.suffices([&] {
    have_room(scratch.normed, count * base.k);
    base.make_room(batch, scratch.copies);
    scratch.peaks.assign(count, {});
    if (!log_masses) return;
    scratch.masses.make_room(panels, count);
    scratch.tops.assign(scratch.masses.stride, 0.0f);
  });
  if (!ready) return memory.status();
  float* normed = scratch.normed.data();
  Team team;
#pragma omp parallel
  {
    const Member member(team);
    static thread_local Tops tops;
    memory.suffices([&] { tops.begin(count); });
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < count; i++) {
      float* row = normed + i * base.k;
      normalise(head->norm, hidden + rows[i] * base.k, row, base.k);
      copy_row(row, base, batch, i, scratch.copies);
    }
    meet();
    // All threads know the same of it.
    if (!memory.ran_out()) {
      const Seen seen{&tops, log_masses ? &scratch.masses : nullptr};
      share_product(normed, base, seen, batch, NoDeltas{}, scratch.copies);
#pragma omp critical
      for (int64_t i = 0; i < count; i++) scratch.peaks[i].consider(tops, i);
    }
    meet([&] {
      if (log_masses)
        for (int64_t i = 0; i < count; i++) scratch.tops[i] = scratch.peaks[i].height;
    });
    if (log_masses && !memory.ran_out()) share_log_masses(scratch, count, panels, log_masses);
  }
  if (memory.ran_out()) return memory.status();
  for (int64_t i = 0; i < count; i++) {
    tokens[i] = scratch.peaks[i].column;
    sound[i] = !scratch.peaks[i].odd && std::isfinite(scratch.peaks[i].height);
  }
  return memory.status();
}

}  // extern "C"
