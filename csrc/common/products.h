// The products that a Gramian and a cross-Gramian are made of, and their order: all pairs i ≤ j of
// the tasks, and of the momentum as the last row, row by row; then of each task with each task's
// history.
#pragma once

#include "types.h"

namespace gcond {

HD constexpr int pairs_of(int rows) { return rows * (rows + 1) / 2; }

// A task that takes no part (scale 0) may hold anything, NaN included: select, do not multiply.
HD double weighted(double sum, double weight) { return weight != 0.0 ? sum * weight : 0.0; }

struct ProductCounts {
  int tasks, rows;  // K; and R = K, or K + 1 with momentum
  bool history;

  HD constexpr int pairs() const { return pairs_of(rows); }
  HD constexpr int total() const { return pairs() + (history ? tasks * tasks : 0); }
};

}  // namespace gcond
