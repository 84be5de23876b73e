// arbitrate: resolves the conflicts on K×K numbers in float64, by one block or on the host. The formulas are those
// of python/_arbitrate.py, in the same order.
#pragma once

#include <cmath>

#include "block.h"

namespace gcond {

// Where the square of a resolved gradient is below this fraction of what its terms would have
// without cancelling, only rounding is left of it: it counts as zero.
constexpr double RESIDUE = 1.0 / (1 << 23);

enum Zone : int { MILD = 0, MODERATE = 1, CRITICAL = 2 };
constexpr int NO_WINNER = -1;

// One event: a resolved conflict.
enum EventColumn : int { FIRST_TASK, SECOND_TASK, COSINE, WINNER, ZONE, EVENT_COLUMNS };

// See gcond_kernels/ops/types.py, like the two structures that follow.
struct Settings {
  double critical, main, weak;  // thresholds
  double remap_power, tolerance;
  double stability_weight, strength_weight;
  double norm_ema_beta, norm_ema_floor;
  double norm_cap;  // infinite where there is none
  double eps;
  int max_iterations;
  bool smooth, resolved_history;
};

struct ArbitrationState {
  double* norm_ema_ptr;              // [K]
  std::int64_t* winners_ptr;         // [window], oldest first, then NO_WINNER
  int window;
  double* history_gramian_ptr;       // [K, K]
  double* history_coefficients_ptr;  // [K, K]
  double* history_scale_ptr;         // [K]
};

struct Arbitration {
  double* weights_ptr;       // [K]
  double* coefficients_ptr;  // [K, K]
  double* events_ptr;        // [max_iterations, EVENT_COLUMNS]
  bool* finite_ptr;          // []
};

// One resolution, or the first of a batch: the others follow in all arrays but `scale_ptr` and
// `history_scale_ptr`, which they share.
struct ArbitrateArguments {
  int tasks;
  const double* gramian_ptr;  // [K, K]
  const double* cross_ptr;    // [K, K], or null
  const double* scale_ptr;    // [K]
  ArbitrationState state;
  Settings settings;
  Arbitration result;

  HD bool takes_part(int task) const { return scale_ptr[task] != 0.0; }
};

// The memory of a resolution, which all threads of a block share.
struct Scratch {
  double* C;        // [K, K], the coefficients: row i makes the resolved gradient of task i
  double* T;        // [K, K], C S Cᵀ
  double* norms;    // [K], of the task gradients
  double* norm_ema; // [K], ν after this step
  double* squares;  // [K], T_ii, or 0 where only rounding is left
  double* roots;    // [K], their square roots
  double* cosines;  // [K], each task's smallest with a later one
  double* history_products;  // [2, K], of the pair's histories with each gradient
  double* history_squares;   // [2, K], the terms of the squared norms of the pair's histories
  double* weights;           // [K]
  std::int32_t* partners;    // [K], of the smallest cosines
  struct Shared {
    double cosine, winner_factor, loser_factor;  // of the projections
    int a, b, winner, loser, zone;               // of the pair
    int streak, last, wins;  // the last winner, how often in a row, and all wins on record
    int iterations;
    bool finite, conflict;
  }* shared;
};

// The size of that memory, in float64.
HD constexpr int scratch_size(int tasks) {
  return 2 * tasks * tasks + 11 * tasks +
         static_cast<int>((sizeof(Scratch::Shared) + sizeof(double) - 1) / sizeof(double));
}

HD Scratch scratch_in(void* memory, int K) {
  double* next = static_cast<double*>(memory);
  const auto take = [&](int count) {
    double* taken = next;
    next += count;
    return taken;
  };
  Scratch s;
  s.C = take(K * K);
  s.T = take(K * K);
  s.norms = take(K);
  s.norm_ema = take(K);
  s.squares = take(K);
  s.roots = take(K);
  s.cosines = take(K);
  s.history_products = take(2 * K);
  s.weights = take(K);
  s.history_squares = take(2 * K);
  s.partners = reinterpret_cast<std::int32_t*>(take(K));
  s.shared = reinterpret_cast<Scratch::Shared*>(next);
  return s;
}

// Resolution `entry` of a batch.
HD ArbitrateArguments batch_entry(ArbitrateArguments a, int entry) {
  const std::int64_t index = entry, vector = index * a.tasks, matrix = vector * a.tasks;
  a.gramian_ptr += matrix;
  if (a.cross_ptr != nullptr) a.cross_ptr += matrix;
  a.state.norm_ema_ptr += vector;
  a.state.winners_ptr += index * a.state.window;
  a.state.history_gramian_ptr += matrix;
  a.state.history_coefficients_ptr += matrix;
  a.result.weights_ptr += vector;
  a.result.coefficients_ptr += matrix;
  a.result.events_ptr += index * EVENT_COLUMNS * a.settings.max_iterations;
  a.result.finite_ptr += index;
  return a;
}

// ν ← β ν + (1-β) n; 0 stands for "not started": it starts at the first norm.
HD double moving_average(const ArbitrateArguments& a, int task, double norm) {
  const Settings& s = a.settings;
  const double old = a.state.norm_ema_ptr[task];
  if (!a.takes_part(task)) return old;
  const double moved =
      old == 0.0 ? norm : s.norm_ema_beta * old + (1.0 - s.norm_ema_beta) * norm;
  return moved < s.norm_ema_floor ? s.norm_ema_floor : moved;
}

// Sets norms, averages, the coefficients before the first projection, and the winners on record.
HD void initialize(const ArbitrateArguments& a, const Scratch& s) {
  const int K = a.tasks;
  parallel_for(K, [&](int i) {
    const double norm = sqrt(a.gramian_ptr[i * K + i]);
    double own = a.takes_part(i) ? 1.0 : 0.0;
    if (norm > a.settings.norm_cap) own *= a.settings.norm_cap / norm;
    s.norms[i] = norm;
    s.norm_ema[i] = moving_average(a, i, norm);
    for (int j = 0; j < K; ++j) s.C[i * K + j] = i == j ? own : 0.0;
  });
  parallel_for(K * K, [&](int ij) {
    const int i = ij / K, j = ij % K;
    s.T[ij] = s.C[i * K + i] * a.gramian_ptr[ij] * s.C[j * K + j];
  });
  run_once([&] {
    Scratch::Shared& c = *s.shared;
    c.last = NO_WINNER;
    c.streak = c.wins = c.iterations = 0;
    for (int entry = 0; entry < a.state.window; ++entry) {
      const int winner = static_cast<int>(a.state.winners_ptr[entry]);
      if (winner == NO_WINNER) continue;
      c.streak = winner == c.last ? c.streak + 1 : 1;
      c.last = winner;
      ++c.wins;
    }
  });
}

// Finds T_ii, or exactly 0 where only rounding is left of it.
HD void find_squares(const ArbitrateArguments& a, const Scratch& s) {
  const int K = a.tasks;
  parallel_for(K, [&](int i) {
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

// Finds the pair i < j of smallest cosine, the first one on a tie, and whether it conflicts.
HD void find_worst_pair(const ArbitrateArguments& a, const Scratch& s) {
  const int K = a.tasks;
  parallel_for(K, [&](int i) {
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
  run_once([&] {
    Scratch::Shared& c = *s.shared;
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

// Finds what the stability of the pair takes: products with their histories
// h = Σ_j coefficients[j] g_j.
HD void find_history_products(const ArbitrateArguments& a, const Scratch& s) {
  const int K = a.tasks;
  parallel_for(2 * K, [&](int index) {
    const double* h = a.state.history_coefficients_ptr + (index < K ? s.shared->a : s.shared->b) * K;
    const int i = index % K;
    double product = 0.0, term = 0.0;
    for (int j = 0; j < K; ++j) {
      if (a.cross_ptr != nullptr) product += a.cross_ptr[i * K + j] * h[j];
      term += h[j] * a.state.history_gramian_ptr[j * K + i];
    }
    s.history_products[index] = product;
    s.history_squares[index] = term * h[i];
  });
}

// max(0, cos(g̃, h)) of the pair's first or second task (eq. 7); 0 where only rounding is left of h.
HD double stability(const ArbitrateArguments& a, const Scratch& s, int task, int of_pair) {
  const int K = a.tasks;
  const double* h = a.state.history_coefficients_ptr + task * K;
  double square = 0.0, product = 0.0, largest = 0.0;
  for (int j = 0; j < K; ++j) {
    square += s.history_squares[of_pair * K + j];
    product += s.C[task * K + j] * s.history_products[of_pair * K + j];
    largest += fabs(h[j]) * sqrt(a.state.history_gramian_ptr[j * K + j]);
  }
  const double squares = s.squares[task] * square;
  if (!(square > RESIDUE * (largest * largest)) || !(squares > 0.0)) return 0.0;
  const double cosine = product / sqrt(squares);
  return cosine > 1.0 ? 1.0 : cosine > 0.0 ? cosine : 0.0;
}

HD double relative_norm(const ArbitrateArguments& a, const Scratch& s, int task) {
  const double average = s.norm_ema[task] + a.settings.norm_ema_floor;
  return average > 0.0 ? s.roots[task] / average : 0.0;
}

// Whether b wins over a: by stability and strength (eq. 7-9), unless one has won too often in a row.
HD bool second_wins(const ArbitrateArguments& a, const Scratch& s) {
  const Scratch::Shared& c = *s.shared;
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
// memory that the library's function takes for large arguments.
HD double quarter_cosine(double y) {
  constexpr double HALF_PI = 1.5707963267948966;
  constexpr int TERMS = 12;  // the next is below 1e-19
  const double square = (HALF_PI * y) * (HALF_PI * y);
  double sum = 1.0;
#pragma unroll
  for (int n = TERMS - 1; n > 0; --n) sum = 1.0 - square * (1.0 / (2 * n * (2 * n - 1))) * sum;
  return sum;
}

// Finds how much of its projection onto the other the winner and the loser give up:
// sin(π/2 (1 + x)) and sin(π/2 (1 - x)) are both cos(π/2 x).
HD void find_projection_factors(const Settings& s, Scratch::Shared& c) {
  c.loser_factor = 1.0;
  if (!s.smooth) {
    c.winner_factor = c.zone == MILD ? 1.0 : 0.0;
  } else if (c.zone == CRITICAL) {
    c.winner_factor = 0.0;  // sin π, exactly
  } else if (c.zone == MODERATE) {
    const double x = (c.cosine - s.main) / (s.critical - s.main);
    // Exact for the default power.
    c.winner_factor = quarter_cosine(s.remap_power == 2.0 ? x * x : exp(s.remap_power * log(x)));
  } else {
    c.winner_factor = quarter_cosine((c.cosine - s.main) / (s.weak - s.main));
    c.loser_factor = c.winner_factor;
  }
}

// Chooses the winner, records the conflict, and finds how far each of the pair is projected.
HD void decide_conflict(const ArbitrateArguments& a, const Scratch& s, bool record) {
  const bool symmetric = !a.settings.smooth && s.shared->zone == MILD;
  if (!symmetric) find_history_products(a, s);
  run_once([&] {
    Scratch::Shared& c = *s.shared;
    const bool second = !symmetric && second_wins(a, s);
    c.winner = second ? c.b : c.a;
    c.loser = second ? c.a : c.b;
    if (!symmetric) {
      c.streak = c.winner == c.last ? c.streak + 1 : 1;
      c.last = c.winner;
      ++c.wins;
    }
    if (record) {
      double* event = a.result.events_ptr + EVENT_COLUMNS * c.iterations;
      event[FIRST_TASK] = c.a;
      event[SECOND_TASK] = c.b;
      event[COSINE] = c.cosine;
      event[WINNER] = symmetric ? NO_WINNER : c.winner;
      event[ZONE] = c.zone;
    }
    ++c.iterations;
    find_projection_factors(a.settings, c);
  });
}

// Updates T = C S Cᵀ where one row of C has changed.
HD void update_products(const ArbitrateArguments& a, const Scratch& s, int row) {
  const int K = a.tasks;
  double* row_S = s.history_products;  // not needed any more
  parallel_for(K, [&](int j) {
    double sum = 0.0;
    for (int l = 0; l < K; ++l) sum += s.C[row * K + l] * a.gramian_ptr[l * K + j];
    row_S[j] = sum;
  });
  parallel_for(K, [&](int i) {
    double sum = 0.0;
    for (int j = 0; j < K; ++j) sum += s.C[i * K + j] * row_S[j];
    s.T[row * K + i] = sum;
    s.T[i * K + row] = sum;
  });
}

// Projects each of the pair onto the other's normal plane, as far as decided; both from the old rows.
HD void project(const ArbitrateArguments& a, const Scratch& s) {
  const int K = a.tasks, winner = s.shared->winner, loser = s.shared->loser;
  const bool clear_loser = !a.settings.smooth && s.shared->zone == CRITICAL;
  const double T_wl = s.T[winner * K + loser];
  const double by_loser = s.shared->winner_factor * (T_wl / s.T[loser * K + loser]);
  const double by_winner = s.shared->loser_factor * (T_wl / s.T[winner * K + winner]);
  parallel_for(K, [&](int j) {
    const double of_winner = s.C[winner * K + j], of_loser = s.C[loser * K + j];
    s.C[winner * K + j] = of_winner - by_loser * of_loser;
    s.C[loser * K + j] = clear_loser ? 0.0 : of_loser - by_winner * of_winner;
  });
  update_products(a, s, winner);
  update_products(a, s, loser);
}

HD void find_whether_finite(const ArbitrateArguments& a, const Scratch& s) {
  const int K = a.tasks;
  parallel_for(K, [&](int i) {
    bool finite = true;
    for (int j = 0; j < K; ++j) finite = finite && fabs(a.gramian_ptr[i * K + j]) < INFINITY;
    s.partners[i] = finite;
  });
  run_once([&] {
    s.shared->finite = true;
    for (int i = 0; i < K; ++i) s.shared->finite = s.shared->finite && s.partners[i];
  });
}

// Resolves all conflicts, into `scratch`. Every block that does finds the same bits; the one that
// records writes the result too. No state is changed.
HD void resolve_conflicts(const ArbitrateArguments& a, const Scratch& s, bool record) {
  const int K = a.tasks;
  find_whether_finite(a, s);
  initialize(a, s);
  // A conflict that is not finite would be decided on noise.
  for (int i = 0; s.shared->finite && i < a.settings.max_iterations; ++i) {
    find_squares(a, s);
    find_worst_pair(a, s);
    if (!s.shared->conflict) break;
    decide_conflict(a, s, record);
    project(a, s);
  }
  const bool finite = s.shared->finite;
  parallel_for(K, [&](int j) {
    double weight = 0.0;
    for (int i = 0; i < K; ++i) weight += s.C[i * K + j];
    s.weights[j] = finite ? weight : 0.0;
  });
  if (!record) return;
  const int written = EVENT_COLUMNS * s.shared->iterations;
  parallel_for(K, [&](int j) { a.result.weights_ptr[j] = s.weights[j]; });
  parallel_for(K * K, [&](int ij) { a.result.coefficients_ptr[ij] = finite ? s.C[ij] : 0.0; });
  parallel_for(EVENT_COLUMNS * a.settings.max_iterations - written,
               [&](int index) { a.result.events_ptr[written + index] = NAN; });
  run_once([&] { *a.result.finite_ptr = finite; });
}

// Stores the last winners, oldest first; the new ones are in the events.
HD void store_winners(const ArbitrateArguments& a, const Scratch& s) {
  const int window = a.state.window;
  int old = 0;
  while (old < window && a.state.winners_ptr[old] != NO_WINNER) ++old;
  const int dropped = s.shared->wins > window ? s.shared->wins - window : 0;
  int stored = 0;  // never ahead of the entry that is read
  for (int entry = dropped; entry < old; ++entry)
    a.state.winners_ptr[stored++] = a.state.winners_ptr[entry];
  int number = old;
  for (int event = 0; event < s.shared->iterations; ++event) {
    const double winner = a.result.events_ptr[EVENT_COLUMNS * event + WINNER];
    if (winner == NO_WINNER) continue;
    if (number++ >= dropped && stored < window)
      a.state.winners_ptr[stored++] = static_cast<std::int64_t>(winner);
  }
}

// Stores the state of the next step, from the scratch of the block that recorded; not where a
// gradient was not finite.
HD void store_state(const ArbitrateArguments& a, const Scratch& s) {
  if (!s.shared->finite) return;
  const int K = a.tasks;
  parallel_for(K * K, [&](int ij) {
    const int i = ij / K, j = ij % K;
    if (a.takes_part(i) && a.takes_part(j)) a.state.history_gramian_ptr[ij] = a.gramian_ptr[ij];
    // A task that took no part keeps its own last gradient as history.
    const bool resolved = a.settings.resolved_history && a.takes_part(i);
    a.state.history_coefficients_ptr[ij] = resolved ? s.C[ij] : (i == j ? 1.0 : 0.0);
  });
  parallel_for(K, [&](int i) {
    a.state.norm_ema_ptr[i] = s.norm_ema[i];
    // The same number from every resolution of a batch; none of them reads it.
    if (a.takes_part(i)) a.state.history_scale_ptr[i] = a.scale_ptr[i];
  });
  run_once([&] { store_winners(a, s); });
}

// Resolves entry `entry` of a batch, in memory of `scratch_size` float64.
HD void arbitrate_entry(const ArbitrateArguments& arguments, void* memory, int entry) {
  const ArbitrateArguments own = batch_entry(arguments, entry);
  const Scratch scratch = scratch_in(memory, own.tasks);
  resolve_conflicts(own, scratch, true);
  store_state(own, scratch);
}

}  // namespace gcond
