// From the sums to the value and the coefficients of the gradient: the table of terms.
//
// As ../cpu/evaluation.py, function by function. One thread does it all: there are a few rows, and
// the host need not wait for the sums.
#include "constants.cuh"

struct Shape {
  long long terms, samples, classes, columns;
};

// Copies a row of the sums that terms are made of, or adds up those of all samples.
__device__ void collect(const double* sums, const long long* columns, Shape shape, long long n,
                        long long c, bool batch, double* row) {
  const long long first = batch ? 0 : n, last = batch ? shape.samples : n + 1;
  for (int k = 0; k < SUM_NUMBER; ++k) {
    row[k] = 0.0;
    if (columns[k] < 0) continue;
    for (long long sample = first; sample < last; ++sample)
      row[k] += sums[(sample * shape.classes + c) * shape.columns + columns[k]];
  }
}

struct Region {
  double value, slope_f, slope_g;  // and its derivatives to the missed and the false alarms
  bool kept;
};

__device__ Region region(const double* term, const double* sums) {
  if (sums[SUM_COUNT] == 0.0) return {0.0, 0.0, 0.0, false};
  const int rule = int(term[TERM_EMPTY]), link = int(term[TERM_LINK]);
  const double P = sums[SUM_TARGETS_SUM], I = sums[SUM_TRUE_POSITIVE_SUM];
  const double F = sums[SUM_FALSE_NEGATIVE_SUM], G = sums[SUM_FALSE_POSITIVE_SUM];
  const bool empty = P == 0.0 && rule != EMPTY_FORMULA && G == G;
  if (empty && rule == EMPTY_SKIP) return {0.0, 0.0, 0.0, false};
  const double hits_i = term[TERM_HITS_I], hits_f = term[TERM_HITS_F], hits_g = term[TERM_HITS_G];
  const double errors_f = term[TERM_ERRORS_F], errors_g = term[TERM_ERRORS_G];
  const double eps = term[TERM_EPS];
  const double hits = hits_i * I + hits_f * F + hits_g * G + term[TERM_HITS_0];
  const double errors = errors_f * F + errors_g * G + term[TERM_ERRORS_0];
  const double size = hits + errors;
  double score, rest, slope_f = 0.0, slope_g = 0.0;  // of 1 - score; I = P - F falls as F grows
  if (empty) {
    score = rule == EMPTY_ONE ? 1.0 : 0.0;
    rest = 1.0 - score;
  } else if (size < eps) {  // the score stays a quotient of its own
    score = hits / eps;
    rest = 1.0 - score;
    slope_f = (hits_i - hits_f) / eps;
    slope_g = -hits_g / eps;
  } else {
    score = hits / size;
    rest = errors / size;
    slope_f = (score * errors_f + rest * (hits_i - hits_f)) / size;
    slope_g = (score * errors_g - rest * hits_g) / size;
  }
  double value = rest, outer = 1.0;
  if (link == LINK_NEGATIVE) {
    value = -score;
  } else if (link == LINK_LOG) {
    value = score < 0.5 ? -log(score) : -log1p(-rest);
    outer = 1.0 / score;
    if (eps > 0.0 && score < eps) {
      value = -log(eps);
      outer = 0.0;
    }
  } else if (link == LINK_POWER) {
    const double gamma = term[TERM_GAMMA], base = rest > 0.0 ? rest : 0.0;
    value = pow(base, gamma);
    outer = base > 0.0 ? gamma * pow(base, gamma - 1.0) : rest == 0.0 && gamma == 1.0 ? 1.0 : 0.0;
    if (rest != rest) value = outer = rest;
  }
  if (empty) return {value, 0.0, 0.0, true};  // a constant, whatever the link's derivative is there
  return {value, outer * slope_f, outer * slope_g, true};
}

// Where a term's results go: one value for each row, or all of them in the first.
struct Results {
  double* values;
  double* coefficients;
  int reduction;
};

__device__ double add_region(const double* term, const double* weights, const double* sums,
                             const long long* columns, const double* scale, Shape shape,
                             Results to) {
  const bool batch = term[TERM_BATCH] != 0.0;
  const long long groups = batch ? (shape.samples < 1 ? shape.samples : 1) : shape.samples;
  double row[SUM_NUMBER], total = 0.0;
  long long kept = 0;
  for (long long n = 0; n < groups; ++n)
    for (long long c = 0; c < shape.classes; ++c) {
      collect(sums, columns, shape, n, c, batch, row);
      const Region r = region(term, row);
      if (!r.kept || weights[c] != weights[c]) continue;  // NaN: the class is left out
      ++kept;
      total += weights[c] * r.value;
      if (to.reduction == REDUCTION_NONE) to.values[n * shape.classes + c] = weights[c] * r.value;
    }
  const double share = to.reduction != REDUCTION_MEAN ? 1.0 : kept > 0 ? 1.0 / kept : 0.0;
  for (long long n = 0; n < shape.samples; ++n)
    for (long long c = 0; c < shape.classes; ++c) {
      collect(sums, columns, shape, n, c, batch, row);
      const Region r = region(term, row);
      if (!r.kept || weights[c] != weights[c]) continue;
      const long long at = n * shape.classes + c;
      const double factor = term[TERM_WEIGHT] * share * scale[at] * weights[c];
      to.coefficients[COEFFICIENTS * at] -= factor * r.slope_f;
      to.coefficients[COEFFICIENTS * at + 1] += factor * r.slope_g;
    }
  return total * share;
}

__device__ double add_bce(const double* term, const double* weights, const double* sums,
                          const long long* columns, const double* scale, Shape shape, Results to) {
  const int rule = int(term[TERM_NORMALIZE]);
  const int by = rule == NORMALIZE_ALL ? SUM_VOXELS : SUM_COUNT;
  const double pos_weight = term[TERM_POS_WEIGHT];
  double row[SUM_NUMBER], voxels = 0.0, total = 0.0;
  long long kept = 0;
  for (long long n = 0; n < shape.samples; ++n)
    for (long long c = 0; c < shape.classes; ++c) {
      collect(sums, columns, shape, n, c, false, row);
      if (weights[c] != weights[c]) continue;
      kept += row[SUM_COUNT] > 0.0;
      if (row[SUM_COUNT] > 0.0 || by == SUM_VOXELS) voxels += row[by];
    }
  for (long long n = 0; n < shape.samples; ++n)
    for (long long c = 0; c < shape.classes; ++c) {
      collect(sums, columns, shape, n, c, false, row);
      if (weights[c] != weights[c] || row[SUM_COUNT] == 0.0) continue;
      const bool mean = to.reduction == REDUCTION_MEAN;
      const double share = rule == NORMALIZE_SUM ? (mean ? 1.0 / kept : 1.0)
                                                 : 1.0 / (mean ? voxels : row[by]);
      double value = row[SUM_BCE_SUM] + row[SUM_BCE_NEG_SUM];
      if (pos_weight != 0.0) value += pos_weight * row[SUM_BCE_POS_SUM];
      const long long at = n * shape.classes + c;
      double factor = weights[c] * share;
      total += factor * value;
      if (to.reduction == REDUCTION_NONE) to.values[at] = factor * value;
      factor *= term[TERM_WEIGHT] * scale[at];
      to.coefficients[COEFFICIENTS * at + 2] += factor * pos_weight;
      to.coefficients[COEFFICIENTS * at + 3] += factor;
    }
  return total;
}

// terms: (terms, TERM_FIELDS), weights: (terms, classes), sums: (samples, classes, columns),
// columns: (SUM_NUMBER,), scale: (samples, classes); value: (1,), or (samples, classes) for
// reduction "none"; by_term: as many for each term; coefficients: (samples, classes, COEFFICIENTS).
__global__ void evaluate(const double* terms, const double* weights, const double* sums,
                                    const long long* columns, const double* scale, Shape shape,
                                    int reduction, double* value, double* by_term,
                                    double* coefficients) {
  const long long rows = shape.samples * shape.classes;
  const long long values = reduction == REDUCTION_NONE ? rows : 1;
  for (long long i = 0; i < values; ++i) value[i] = 0.0;
  for (long long i = 0; i < values * shape.terms; ++i) by_term[i] = 0.0;
  for (long long i = 0; i < rows * COEFFICIENTS; ++i) coefficients[i] = 0.0;
  for (long long k = 0; k < shape.terms; ++k) {
    const double* term = terms + k * TERM_FIELDS;
    const double* factors = weights + k * shape.classes;
    const Results to = {by_term + k * values, coefficients, reduction};
    const double total = term[TERM_KIND] == KIND_BCE
                             ? add_bce(term, factors, sums, columns, scale, shape, to)
                             : add_region(term, factors, sums, columns, scale, shape, to);
    if (reduction != REDUCTION_NONE) to.values[0] = total;
    for (long long i = 0; i < values; ++i) value[i] += term[TERM_WEIGHT] * to.values[i];
  }
}
