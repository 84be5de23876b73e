// arbitrate: the resolution itself, on K×K numbers in float64, by one block. The formulas are those
// of python/arbitrate.py, in the same order.
#pragma once

#include "common.cuh"
#include "launch.cuh"
#include "team.cuh"

namespace gcond {

// Beyond this many the two matrices of the resolution leave the block's shared memory.
constexpr int MOST_TASKS = 64;

// Where the square of a resolved gradient falls below this part of what its terms would have
// without cancelling, only rounding is left of it: it counts as zero.
constexpr double RESIDUE = 1.0 / (1 << 23);

enum Zone : int { MILD = 0, MODERATE = 1, CRITICAL = 2 };
constexpr int NO_WINNER = -1;

struct Settings {
  double critical, main, weak;  // thresholds
  double tolerance, remap_power;
  double stability_weight, strength_weight;
  double norm_ema_beta, norm_ema_floor;
  double norm_cap;  // infinite where there is none
  double eps;
  int max_iterations;
  bool smooth, resolved_history;
};

// What is carried from step to step.
struct State {
  double* norm_ema;         // [K]
  std::int64_t* winners;    // [window], oldest first, then NO_WINNER
  int window;
  double* history_gramian;  // [K, K]
  double* history_rows;     // [K, K]
  double* history_scale;    // [K]
};

struct Decision {
  double* weights;  // [K]
  double* rows;     // [K, K]
  double* events;   // [max_iterations, 5]
  bool* finite;     // []
};

// One resolution, or the first of a batch: the others follow in all arrays but `scale` and
// `history_scale`, which they share.
struct Arbitrate {
  int tasks;
  const double* gramian;  // [K, K]
  const double* cross;    // [K, K], or null
  const double* scale;    // [K]
  State state;
  Settings settings;
  Decision decision;
};

// The memory of a resolution, which all threads of a block share.
struct Scratch {
  double* C;          // [K, K], row i makes the resolved gradient of task i
  double* T;          // [K, K], C S Cᵀ
  double* norms;      // [K], of the task gradients
  double* average;    // [K], ν as it will be
  double* squares;    // [K], T_ii, or 0 where only rounding is left
  double* roots;      // [K], their roots
  double* cosines;    // [K], each task's smallest with a later one
  double* along;      // [2, K], products of the pair's histories with each gradient
  double* weights;    // [K]
  double* pair_norm;  // [2, K], parts of the squared norms of the pair's histories
  std::int32_t* partners;  // [K], of the smallest cosines
  struct Common {
    double cosine, give_winner, give_loser;
    int a, b, winner, loser, zone;
    int streak, last, wins;  // the last winner, how often in a row, and all wins on record
    int iterations;
    bool finite, conflict;
  }* common;
};

// How much memory that is.
HD constexpr int scratch_doubles(int tasks) {
  return 2 * tasks * tasks + 11 * tasks +
         static_cast<int>((sizeof(Scratch::Common) + sizeof(double) - 1) / sizeof(double));
}

// Cuts a piece of memory of so many float64 into the parts.
HD Scratch scratch_in(void* memory, int tasks) {
  const int K = tasks;
  double* at = static_cast<double*>(memory);
  Scratch s;
  const auto take = [&](int count) {
    double* taken = at;
    at += count;
    return taken;
  };
  s.C = take(K * K);
  s.T = take(K * K);
  s.norms = take(K);
  s.average = take(K);
  s.squares = take(K);
  s.roots = take(K);
  s.cosines = take(K);
  s.along = take(2 * K);
  s.weights = take(K);
  s.pair_norm = take(2 * K);
  s.partners = reinterpret_cast<std::int32_t*>(take(K));
  s.common = reinterpret_cast<Scratch::Common*>(at);
  return s;
}

// Resolution `entry` of a batch.
HD Arbitrate entry_of(Arbitrate a, int entry) {
  const std::int64_t K = a.tasks, rows = entry * K, matrices = rows * K;
  a.gramian += matrices;
  if (a.cross != nullptr) a.cross += matrices;
  a.state.norm_ema += rows;
  a.state.winners += static_cast<std::int64_t>(entry) * a.state.window;
  a.state.history_gramian += matrices;
  a.state.history_rows += matrices;
  a.decision.weights += rows;
  a.decision.rows += matrices;
  a.decision.events += static_cast<std::int64_t>(entry) * 5 * a.settings.max_iterations;
  a.decision.finite += entry;
  return a;
}

HD bool takes_part(const Arbitrate& a, int task) { return a.scale[task] != 0.0; }

// ν ← β ν + (1-β) n; 0 stands for "not started": it starts at the first norm.
HD double moving_average(const Arbitrate& a, int task, double norm) {
  const Settings& s = a.settings;
  const double old = a.state.norm_ema[task];
  if (!takes_part(a, task)) return old;
  const double moved =
      old == 0.0 ? norm : s.norm_ema_beta * old + (1.0 - s.norm_ema_beta) * norm;
  return moved < s.norm_ema_floor ? s.norm_ema_floor : moved;
}

// Norms, averages, the rows before the first projection, and the winners on record.
HD void begin(const Arbitrate& a, const Scratch& s) {
  const int K = a.tasks;
  each(K, [&](int i) {
    const double norm = sqrt(a.gramian[i * K + i]);
    double own = takes_part(a, i) ? 1.0 : 0.0;
    if (norm > a.settings.norm_cap) own *= a.settings.norm_cap / norm;
    s.norms[i] = norm;
    s.average[i] = moving_average(a, i, norm);
    for (int j = 0; j < K; ++j) s.C[i * K + j] = i == j ? own : 0.0;
  });
  each(K * K, [&](int at) {
    const int i = at / K, j = at % K;
    s.T[at] = s.C[i * K + i] * a.gramian[at] * s.C[j * K + j];
  });
  once([&] {
    Scratch::Common& c = *s.common;
    c.last = NO_WINNER;
    c.streak = c.wins = c.iterations = 0;
    for (int place = 0; place < a.state.window; ++place) {
      const int winner = static_cast<int>(a.state.winners[place]);
      if (winner == NO_WINNER) continue;
      c.streak = winner == c.last ? c.streak + 1 : 1;
      c.last = winner;
      ++c.wins;
    }
  });
}

// T_ii, or exactly 0 where only rounding is left of it.
HD void find_squares(const Arbitrate& a, const Scratch& s) {
  const int K = a.tasks;
  each(K, [&](int i) {
    double largest = 0.0;
    for (int j = 0; j < K; ++j) largest += fabs(s.C[i * K + j]) * s.norms[j];
    const double square = s.T[i * K + i];
    s.squares[i] = square > RESIDUE * (largest * largest) ? square : 0.0;
    s.roots[i] = sqrt(s.squares[i]);
  });
}

HD int zone_of(double cosine, const Settings& s) {
  // θ_crit itself is critical in the smooth form alone.
  if (cosine < s.critical || (s.smooth && cosine == s.critical)) return CRITICAL;
  return cosine < s.main ? MODERATE : MILD;
}

// The pair i < j of smallest cosine, the first one on a tie, and whether it conflicts.
HD void find_worst_pair(const Arbitrate& a, const Scratch& s) {
  const int K = a.tasks;
  each(K, [&](int i) {
    s.cosines[i] = 1.0;
    s.partners[i] = i;
    if (s.squares[i] == 0.0) return;
    for (int j = i + 1; j < K; ++j) {
      if (s.squares[j] == 0.0) continue;
      // Two roots: the product of two squares may leave the range of float64.
      double cosine = s.T[i * K + j] / (s.roots[i] * s.roots[j]);
      cosine = cosine < -1.0 ? -1.0 : cosine;  // beyond by rounding alone: a tie all the same
      if (cosine < s.cosines[i]) {
        s.cosines[i] = cosine;
        s.partners[i] = j;
      }
    }
  });
  once([&] {
    Scratch::Common& c = *s.common;
    c.a = c.b = 0;
    c.cosine = 1.0;
    for (int i = 0; i < K; ++i) {
      if (s.cosines[i] < c.cosine) {
        c.cosine = s.cosines[i];
        c.a = i;
        c.b = s.partners[i];
      }
    }
    c.conflict = c.cosine < a.settings.weak - a.settings.tolerance;
    c.zone = zone_of(c.cosine, a.settings);
  });
}

// What the stability of the pair is made of: products with their histories h = Σ_j rows[j] ĝ'_j.
HD void find_products_with_history(const Arbitrate& a, const Scratch& s) {
  const int K = a.tasks;
  each(2 * K, [&](int at) {
    const double* h = a.state.history_rows + (at < K ? s.common->a : s.common->b) * K;
    const int i = at % K;
    double along = 0.0, part = 0.0;
    for (int j = 0; j < K; ++j) {
      if (a.cross != nullptr) along += a.cross[i * K + j] * h[j];
      part += h[j] * a.state.history_gramian[j * K + i];
    }
    s.along[at] = along;
    s.pair_norm[at] = part * h[i];
  });
}

// max(0, cos(g̃, h)) of the pair's first or second task (eq. 7); 0 where only rounding is left of h.
HD double stability(const Arbitrate& a, const Scratch& s, int task, int place) {
  const int K = a.tasks;
  const double* h = a.state.history_rows + task * K;
  double squared_norm = 0.0, product = 0.0, largest = 0.0;
  for (int j = 0; j < K; ++j) {
    squared_norm += s.pair_norm[place * K + j];
    product += s.C[task * K + j] * s.along[place * K + j];
    largest += fabs(h[j]) * sqrt(a.state.history_gramian[j * K + j]);
  }
  const double lengths = s.squares[task] * squared_norm;
  if (!(squared_norm > RESIDUE * (largest * largest)) || !(lengths > 0.0)) return 0.0;
  const double cosine = product / sqrt(lengths);
  return cosine > 1.0 ? 1.0 : cosine > 0.0 ? cosine : 0.0;
}

HD double relative_norm(const Arbitrate& a, const Scratch& s, int task) {
  const double average = s.average[task] + a.settings.norm_ema_floor;
  return average > 0.0 ? s.roots[task] / average : 0.0;
}

// Whether b wins over a: by stability and strength (eq. 7-9), unless one has won too long.
HD bool second_wins(const Arbitrate& a, const Scratch& s) {
  const Scratch::Common& c = *s.common;
  const int window = a.state.window;
  if (window > 0 && c.wins >= window && c.streak >= window) {
    if (c.last == c.a) return true;
    if (c.last == c.b) return false;
  }
  const double r_a = relative_norm(a, s, c.a), r_b = relative_norm(a, s, c.b);
  const double total = r_a + r_b + a.settings.eps;
  const double by_stability = a.settings.stability_weight, by_strength = a.settings.strength_weight;
  return by_stability * stability(a, s, c.b, 1) + by_strength * r_b / total >
         by_stability * stability(a, s, c.a, 0) + by_strength * r_a / total;
}

// cos(π/2 · y) for y in [0, 1], by its series: the same bits on every processor, and none of the
// memory that the library's takes for large arguments.
HD double quarter_cosine(double y) {
  constexpr double HALF_PI = 1.5707963267948966;
  constexpr int TERMS = 12;  // the next is below 1e-19
  const double square = (HALF_PI * y) * (HALF_PI * y);
  double sum = 1.0;
#pragma unroll
  for (int n = TERMS - 1; n > 0; --n) sum = 1.0 - square * (1.0 / (2 * n * (2 * n - 1))) * sum;
  return sum;
}

// x to the remapping power, exact for the default.
HD double remapped(double x, double power) {
  return power == 2.0 ? x * x : exp(power * log(x));
}

// How much of its projection onto the other the winner and the loser give up:
// sin(π/2 (1 + x)) and sin(π/2 (1 - x)) are both cos(π/2 x).
HD void find_shares(const Settings& s, Scratch::Common& c) {
  c.give_loser = 1.0;
  if (!s.smooth) {
    c.give_winner = c.zone == MILD ? 1.0 : 0.0;
    return;
  }
  if (c.zone == CRITICAL) {
    c.give_winner = 0.0;  // sin π, exactly
  } else if (c.zone == MODERATE) {
    const double x = (c.cosine - s.main) / (s.critical - s.main);
    c.give_winner = quarter_cosine(remapped(x, s.remap_power));
  } else {
    c.give_winner = quarter_cosine((c.cosine - s.main) / (s.weak - s.main));
    c.give_loser = c.give_winner;
  }
}

// Chooses the winner, records the conflict, and finds how far each of the pair gives way.
HD void decide_conflict(const Arbitrate& a, const Scratch& s, bool record) {
  const bool both_alike = !a.settings.smooth && s.common->zone == MILD;
  if (!both_alike) find_products_with_history(a, s);
  once([&] {
    Scratch::Common& c = *s.common;
    const bool second = !both_alike && second_wins(a, s);
    c.winner = second ? c.b : c.a;
    c.loser = second ? c.a : c.b;
    if (!both_alike) {
      c.streak = c.winner == c.last ? c.streak + 1 : 1;
      c.last = c.winner;
      ++c.wins;
    }
    if (record) {
      double* event = a.decision.events + 5 * c.iterations;
      event[0] = c.a;
      event[1] = c.b;
      event[2] = c.cosine;
      event[3] = both_alike ? NO_WINNER : c.winner;
      event[4] = c.zone;
    }
    ++c.iterations;
    find_shares(a.settings, c);
  });
}

// One row of C has changed: T = C S Cᵀ in that row and column anew.
HD void update_products(const Arbitrate& a, const Scratch& s, int row) {
  const int K = a.tasks;
  double* by_S = s.along;  // not needed any more
  each(K, [&](int j) {
    double sum = 0.0;
    for (int l = 0; l < K; ++l) sum += s.C[row * K + l] * a.gramian[l * K + j];
    by_S[j] = sum;
  });
  each(K, [&](int i) {
    double sum = 0.0;
    for (int j = 0; j < K; ++j) sum += s.C[i * K + j] * by_S[j];
    s.T[row * K + i] = sum;
    s.T[i * K + row] = sum;
  });
}

// The rows of the pair, each made to give way to the other; both from the old rows.
HD void project(const Arbitrate& a, const Scratch& s) {
  const int K = a.tasks, winner = s.common->winner, loser = s.common->loser;
  const bool cleared = !a.settings.smooth && s.common->zone == CRITICAL;
  const double T_wl = s.T[winner * K + loser];
  const double by_loser = s.common->give_winner * (T_wl / s.T[loser * K + loser]);
  const double by_winner = s.common->give_loser * (T_wl / s.T[winner * K + winner]);
  each(K, [&](int j) {
    const double of_winner = s.C[winner * K + j], of_loser = s.C[loser * K + j];
    s.C[winner * K + j] = of_winner - by_loser * of_loser;
    s.C[loser * K + j] = cleared ? 0.0 : of_loser - by_winner * of_winner;
  });
  update_products(a, s, winner);
  update_products(a, s, loser);
}

HD void find_whether_finite(const Arbitrate& a, const Scratch& s) {
  const int K = a.tasks;
  each(K, [&](int i) {
    bool finite = true;
    for (int j = 0; j < K; ++j) finite = finite && fabs(a.gramian[i * K + j]) < INFINITY;
    s.partners[i] = finite;
  });
  once([&] {
    s.common->finite = true;
    for (int i = 0; i < K; ++i) s.common->finite = s.common->finite && s.partners[i];
  });
}

// The whole resolution, into `scratch`. Every block that runs it finds the same; the one that
// records writes the decision too. No state is changed.
HD void arbitrate_in(const Arbitrate& a, const Scratch& s, bool record) {
  const int K = a.tasks;
  find_whether_finite(a, s);
  begin(a, s);
  // A conflict that is not finite would be decided on noise.
  for (int i = 0; s.common->finite && i < a.settings.max_iterations; ++i) {
    find_squares(a, s);
    find_worst_pair(a, s);
    if (!s.common->conflict) break;
    decide_conflict(a, s, record);
    project(a, s);
  }
  const bool finite = s.common->finite;
  each(K, [&](int j) {
    double weight = 0.0;
    for (int i = 0; i < K; ++i) weight += s.C[i * K + j];
    s.weights[j] = finite ? weight : 0.0;
  });
  if (!record) return;
  const int iterations = s.common->iterations;
  each(K, [&](int j) { a.decision.weights[j] = s.weights[j]; });
  each(K * K, [&](int at) { a.decision.rows[at] = finite ? s.C[at] : 0.0; });
  each(5 * (a.settings.max_iterations - iterations),
       [&](int at) { a.decision.events[5 * iterations + at] = NAN; });
  once([&] { *a.decision.finite = finite; });
}

// The last winners, oldest first; the new ones stand in the events.
HD void keep_winners(const Arbitrate& a, const Scratch& s) {
  int old = 0;
  while (old < a.state.window && a.state.winners[old] != NO_WINNER) ++old;
  const int dropped = s.common->wins > a.state.window ? s.common->wins - a.state.window : 0;
  int place = 0;  // never ahead of the entry that is read
  for (int entry = dropped; entry < old; ++entry)
    a.state.winners[place++] = a.state.winners[entry];
  int number = old;
  for (int event = 0; event < s.common->iterations; ++event) {
    const double winner = a.decision.events[5 * event + 3];
    if (winner == NO_WINNER) continue;
    if (number++ >= dropped && place < a.state.window)
      a.state.winners[place++] = static_cast<std::int64_t>(winner);
  }
}

// The state of the next step, from the scratch of the block that recorded; unless a gradient was
// not finite.
HD void keep_state(const Arbitrate& a, const Scratch& s) {
  if (!s.common->finite) return;
  const int K = a.tasks;
  each(K * K, [&](int at) {
    const int i = at / K, j = at % K;
    if (takes_part(a, i) && takes_part(a, j)) a.state.history_gramian[at] = a.gramian[at];
    // A task that sat this step out keeps its own last gradient as history.
    const bool resolved = a.settings.resolved_history && takes_part(a, i);
    a.state.history_rows[at] = resolved ? s.C[at] : (i == j ? 1.0 : 0.0);
  });
  each(K, [&](int i) {
    a.state.norm_ema[i] = s.average[i];
    // The same number from every resolution of a batch; none of them reads it.
    if (takes_part(a, i)) a.state.history_scale[i] = a.scale[i];
  });
  once([&] { keep_winners(a, s); });
}

// `batch` resolutions.
void arbitrate(const Place& place, const Arbitrate& arguments, int batch);

}  // namespace gcond
