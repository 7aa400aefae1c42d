// From the sums to the value and the coefficients of the gradient: the table of terms.
//
// As ../cpu/evaluation.py and what it calls, function by function, by one block, so that the host
// need not wait for the sums. A thread takes whole rows of the sums; what is added up over rows is
// added up in one order. Where a target was invalid, the value and all coefficients are NaN: nobody
// is told sooner.
#include "operands.cuh"
#include "reduction.cuh"

constexpr int NUMBERS = TABLE_NUMBERS;

// The terms, TERM_FIELDS numbers each, and then for each term a weight for each class.
struct Table {
  double numbers[NUMBERS];
  long long columns[SUM_NUMBER];  // where the sums that terms are made of are stored; -1: absent
};

struct Shape {
  long long terms, samples, classes, columns, reduction;
  long long coefficients;  // of a row
};

// What a row's coefficients are multiplied by: a number, or numbers of the device.
struct Scale {
  double number;
  const char* address;
  long long code, stride_n, stride_c;

  __device__ double of(long long n, long long c) const {
    if (address == nullptr) return number;
    return number * read_real<double>(address + n * stride_n + c * stride_c, code);
  }
};

struct Region {
  double value, slope_f, slope_g;  // and its derivatives to the missed and the false alarms
  bool kept;
};

__device__ bool is_empty(const double* term, const double* sums) {
  const double G = sums[SUM_FALSE_POSITIVE_SUM];
  return sums[SUM_TARGETS_SUM] == 0.0 && term[TERM_EMPTY] != EMPTY_FORMULA && G == G;
}

__device__ bool is_kept(const double* term, const double* sums) {
  return sums[SUM_COUNT] != 0.0 && !(is_empty(term, sums) && term[TERM_EMPTY] == EMPTY_SKIP);
}

__device__ Region region(const double* term, const double* sums) {
  if (!is_kept(term, sums)) return {0.0, 0.0, 0.0, false};
  const int rule = int(term[TERM_EMPTY]), link = int(term[TERM_LINK]);
  const double I = sums[SUM_TRUE_POSITIVE_SUM];
  const double F = sums[SUM_FALSE_NEGATIVE_SUM], G = sums[SUM_FALSE_POSITIVE_SUM];
  const bool empty = is_empty(term, sums);
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

// One evaluation, as every thread sees it.
struct Work {
  const double* sums;
  const long long* columns;
  Scale scale;
  Shape shape;
  double* coefficients;
  double* buffer;  // of block_sum

  // Copies a row of the sums that terms are made of, or adds up those of all samples.
  __device__ void collect(long long n, long long c, bool batch, double* row) const {
    const long long first = batch ? 0 : n, last = batch ? shape.samples : n + 1;
#pragma unroll
    for (int k = 0; k < SUM_NUMBER; ++k) {
      row[k] = 0.0;
      if (columns[k] < 0) continue;
      for (long long sample = first; sample < last; ++sample)
        row[k] += sums[(sample * shape.classes + c) * shape.columns + columns[k]];
    }
  }

  // A column of a row, or of the rows of all samples.
  __device__ double counted(long long n, long long c, bool batch, long long column) const {
    const long long first = batch ? 0 : n, last = batch ? shape.samples : n + 1;
    double total = 0.0;
    for (long long sample = first; sample < last; ++sample)
      total += sums[(sample * shape.classes + c) * shape.columns + column];
    return total;
  }

  // As `collect`, with I, F and G of the term's form.
  __device__ void collect_region(const double* term, long long n, long long c, bool batch,
                                 double* row) const {
    collect(n, c, batch, row);
    if (term[TERM_FORM] == FORM_L1) {
      row[SUM_TRUE_POSITIVE_SUM] = row[SUM_L1_TRUE_POSITIVE_SUM];
      row[SUM_FALSE_NEGATIVE_SUM] = row[SUM_L1_FALSE_NEGATIVE_SUM];
      row[SUM_FALSE_POSITIVE_SUM] = row[SUM_L1_FALSE_POSITIVE_SUM];
    } else if (term[TERM_FORM] == FORM_SQUARED) {
      row[SUM_TRUE_POSITIVE_SUM] = row[SUM_PRODUCT_SUM];
      row[SUM_FALSE_NEGATIVE_SUM] = 0.0;
      row[SUM_FALSE_POSITIVE_SUM] = row[SUM_SQUARED_ERROR_SUM];
    }
    if (term[TERM_KIND] == KIND_LOVASZ) {  // NaN if a prediction is
      const bool sorts = term[TERM_BINS] == 0.0;
      const double undefined =
          sorts ? row[SUM_UNDEFINED] : counted(n, c, batch, (long long)term[TERM_HISTOGRAM]);
      row[SUM_FALSE_POSITIVE_SUM] = undefined > 0.0 ? __longlong_as_double(0x7ff8000000000000LL) : 0.0;
    }
  }

  // Adds to a row's coefficients `at` and `at` + 1.
  __device__ void add(long long n, long long c, int at, double first, double second) const {
    double* row = coefficients + (n * shape.classes + c) * shape.coefficients + at;
    row[0] += first;
    row[1] += second;
  }

  // Unless it is NaN, as all coefficients are where a target is invalid.
  __device__ void set_gamma(long long n, long long c, double gamma) const {
    double* row = coefficients + (n * shape.classes + c) * shape.coefficients;
    if (row[COEFFICIENT_GAMMA] == row[COEFFICIENT_GAMMA]) row[COEFFICIENT_GAMMA] = gamma;
  }
};

// Both return the reduced value; the value of each row is written to `values` for reduction "none".
// weights: of the term's classes; NaN leaves a class out.

// How many rows are kept of sample n (scope "image"), or of class c ("class").
__device__ double kept_in_line(const Work& w, const double* term, const double* weights, long long n,
                               long long c) {
  const bool along_classes = term[TERM_SCOPE] == SCOPE_IMAGE;
  double row[SUM_NUMBER], kept = 0.0;
  for (long long k = 0; k < (along_classes ? w.shape.classes : w.shape.samples); ++k) {
    const long long i = along_classes ? n : k, j = along_classes ? k : c;
    if (weights[j] != weights[j]) continue;
    w.collect_region(term, i, j, false, row);
    kept += is_kept(term, row);
  }
  return kept;
}

__device__ double add_region(const Work& w, const double* term, const double* weights,
                             double* values) {
  const bool batch = term[TERM_SCOPE] == SCOPE_BATCH, image = term[TERM_SCOPE] == SCOPE_IMAGE;
  const bool mean = w.shape.reduction == REDUCTION_MEAN;
  const bool in_lines = mean && (image || term[TERM_SCOPE] == SCOPE_CLASS);
  const long long classes = w.shape.classes, samples = w.shape.samples;
  const long long groups = !batch ? samples * classes : samples > 0 ? classes : 0;
  double row[SUM_NUMBER], total = 0.0, kept = 0.0;
  for (long long g = threadIdx.x; g < groups; g += THREADS) {
    const long long n = g / classes, c = g % classes;
    w.collect_region(term, n, c, batch, row);
    const Region r = region(term, row);
    if (!r.kept || weights[c] != weights[c]) continue;
    if (!in_lines) kept += 1.0;
    const double of_line = in_lines ? kept_in_line(w, term, weights, n, c) : 1.0;
    total += weights[c] * r.value / of_line;
    if (w.shape.reduction == REDUCTION_NONE) values[g] += weights[c] * r.value;
  }
  if (in_lines)  // the lines that have a row that is kept
    for (long long k = threadIdx.x; k < (image ? samples : classes); k += THREADS)
      kept += kept_in_line(w, term, weights, k, k) > 0.0;
  total = sum_for_all(total, w.buffer);
  kept = sum_for_all(kept, w.buffer);
  const double share = !mean ? 1.0 : kept > 0.0 ? 1.0 / kept : 0.0;
  for (long long g = threadIdx.x; g < groups; g += THREADS) {
    const long long c = g % classes, first = batch ? 0 : g / classes;
    const long long last = batch ? samples : first + 1;
    w.collect_region(term, first, c, batch, row);
    const Region r = region(term, row);
    if (!r.kept || weights[c] != weights[c]) continue;
    double factor = term[TERM_WEIGHT] * share * weights[c];
    if (in_lines) factor /= kept_in_line(w, term, weights, first, c);
    for (long long n = first; n < last; ++n) {
      const double scaled = factor * w.scale.of(n, c);
      const double hits = -scaled * r.slope_f, errors = scaled * r.slope_g;
      if (term[TERM_FORM] == FORM_SQUARED) {
        w.add(n, c, COEFFICIENT_ON_TARGET, hits, 0.0);
        w.add(n, c, COEFFICIENT_SQUARE, 2.0 * errors, 0.0);
      } else {
        w.add(n, c, term[TERM_FORM] == FORM_L1 ? COEFFICIENT_BELOW : COEFFICIENT_ON_TARGET, hits, errors);
      }
    }
  }
  return total * share;
}

// The Lovasz extension of a row's histogram, in every thread; adds `factor` dL/de to the coefficients
// of samples first to last. All threads come here together, and each takes bins that lie side by
// side. scan: twice as many doubles as threads.
__device__ double lovasz(const Work& w, const double* term, long long n, long long c, bool batch,
                         double P, double factor, double* scan) {
  const long long at = (long long)term[TERM_HISTOGRAM], bins = (long long)term[TERM_BINS];
  const long long per_octave = bins / OCTAVES, lowest = (long long)term[TERM_LOWEST];
  const long long share = (bins + THREADS - 1) / THREADS;
  const long long top = bins - 1 - threadIdx.x * share;  // and down from there
  double f = 0.0, b = 0.0;
  for (long long k = top; k > top - share && k >= 0; --k) {
    f += w.counted(n, c, batch, at + 1 + k);
    b += w.counted(n, c, batch, at + 1 + bins + k);
  }
  __syncthreads();  // what was there may still be read
  scan[threadIdx.x] = f;
  scan[THREADS + threadIdx.x] = b;
  __syncthreads();
  f = b = 0.0;
  for (int before = 0; before < int(threadIdx.x); ++before) {
    f += scan[before];
    b += scan[THREADS + before];
  }
  double value = 0.0, inside = P - f, united = P + b;
  const long long first = batch ? 0 : n, last = batch ? w.shape.samples : n + 1;
  for (long long k = top; k > top - share && k >= 0; --k) {
    const double n1 = w.counted(n, c, batch, at + 1 + k);
    const double n0 = w.counted(n, c, batch, at + 1 + bins + k);
    double of_foreground = 1.0, of_background = 1.0 / (n0 > 1.0 ? n0 : 1.0);
    if (united > 0.0) {
      of_foreground = 0.5 / united + 0.5 / (united + n0);
      of_background = 0.5 * (inside + (inside - n1)) / united / (united + n0);
    }
    if (n1 + n0 > 0.0) {
      const double octave = ldexp(1.0, int(lowest + k / per_octave));
      const double edge = k > 0 ? octave * (1.0 + double(k % per_octave) / double(per_octave)) : 0.0;
      const double unit = ldexp(octave, -FRACTION_BITS);
      value += of_foreground * (n1 * edge + unit * w.counted(n, c, batch, at + 1 + 2 * bins + k));
      value += of_background * (n0 * edge + unit * w.counted(n, c, batch, at + 1 + 3 * bins + k));
    }
    if (factor != 0.0) {
      for (long long sample = first; sample < last; ++sample) {
        const double scaled = factor * w.scale.of(sample, c);
        double* slopes = w.coefficients + (sample * w.shape.classes + c) * w.shape.coefficients;
        slopes[COEFFICIENTS + k] += scaled * of_foreground;
        slopes[COEFFICIENTS + bins + k] += scaled * of_background;
      }
    }
    inside -= n1;
    united += n0;
  }
  return sum_for_all(value, w.buffer);
}

// As add_region, row by row.
__device__ double add_lovasz(const Work& w, const double* term, const double* weights,
                             double* values, double* scan) {
  const bool batch = term[TERM_SCOPE] == SCOPE_BATCH, image = term[TERM_SCOPE] == SCOPE_IMAGE;
  const bool mean = w.shape.reduction == REDUCTION_MEAN;
  const bool in_lines = mean && (image || term[TERM_SCOPE] == SCOPE_CLASS);
  const long long classes = w.shape.classes, samples = w.shape.samples;
  const long long groups = !batch ? samples * classes : samples > 0 ? classes : 0;
  double row[SUM_NUMBER], total = 0.0, kept = 0.0;
  if (in_lines) {
    for (long long k = threadIdx.x; k < (image ? samples : classes); k += THREADS)
      kept += kept_in_line(w, term, weights, k, k) > 0.0;
  } else {
    for (long long g = threadIdx.x; g < groups; g += THREADS) {
      w.collect_region(term, g / classes, g % classes, batch, row);
      kept += is_kept(term, row) && weights[g % classes] == weights[g % classes];
    }
  }
  kept = sum_for_all(kept, w.buffer);
  const double share = !mean ? 1.0 : kept > 0.0 ? 1.0 / kept : 0.0;
  for (long long g = 0; g < groups; ++g) {
    const long long n = g / classes, c = g % classes;
    w.collect_region(term, n, c, batch, row);
    if (!is_kept(term, row) || weights[c] != weights[c]) continue;
    double part = share * weights[c];
    if (in_lines) part /= kept_in_line(w, term, weights, n, c);
    const bool constant = is_empty(term, row);  // the rule's score, whatever the errors are
    const double factor = constant ? 0.0 : term[TERM_WEIGHT] * part;
    if (term[TERM_BINS] == 0.0) {  // it sorts, and is told its part
      if (!constant && threadIdx.x == 0)
        for (long long sample = n; sample < (batch ? samples : n + 1); ++sample)
          w.add(sample, c, COEFFICIENTS, factor, factor * w.scale.of(sample, c));
      if (!constant) continue;
    }
    double value = constant ? 0.0 : lovasz(w, term, n, c, batch, row[SUM_TARGETS_SUM], factor, scan);
    const double undefined = row[SUM_FALSE_POSITIVE_SUM];
    if (undefined != undefined) value = undefined;
    if (constant) value = term[TERM_EMPTY] == EMPTY_ONE ? 0.0 : 1.0;
    total += part * value;
    if (w.shape.reduction == REDUCTION_NONE && threadIdx.x == 0) values[g] += part * value;
  }
  return total;
}

__device__ double add_bce(const Work& w, const double* term, const double* weights,
                          double* values) {
  const int rule = int(term[TERM_NORMALIZE]);
  const bool all = rule == NORMALIZE_ALL;
  const bool focal = term[TERM_KIND] == KIND_FOCAL_BCE;
  // Of smoothed labels: of the sums of each label, and of those with the other label.
  const double half = 0.5 * term[TERM_SMOOTHING];
  const double own_pos = (1.0 - half) * term[TERM_POS_WEIGHT], own_neg = (1.0 - half) * term[TERM_NEG_WEIGHT];
  const double other_pos = half * term[TERM_NEG_WEIGHT], other_neg = half * term[TERM_POS_WEIGHT];
  const long long classes = w.shape.classes, rows = w.shape.samples * classes;
  const bool mean = w.shape.reduction == REDUCTION_MEAN;
  double row[SUM_NUMBER], voxels = 0.0, kept = 0.0, total = 0.0;
  for (long long g = threadIdx.x; g < rows; g += THREADS) {
    w.collect(g / classes, g % classes, false, row);
    if (weights[g % classes] != weights[g % classes]) continue;
    kept += row[SUM_COUNT] > 0.0;
    if (row[SUM_COUNT] > 0.0 || all) voxels += all ? row[SUM_VOXELS] : row[SUM_COUNT];
  }
  voxels = sum_for_all(voxels, w.buffer);
  kept = sum_for_all(kept, w.buffer);
  for (long long g = threadIdx.x; g < rows; g += THREADS) {
    const long long n = g / classes, c = g % classes;
    w.collect(n, c, false, row);
    if (weights[c] != weights[c] || row[SUM_COUNT] == 0.0) continue;
    const double share = rule == NORMALIZE_SUM ? (mean ? 1.0 / kept : 1.0)
                                               : 1.0 / (mean  ? voxels
                                                      : all ? row[SUM_VOXELS]
                                                            : row[SUM_COUNT]);
    const double pos = focal ? row[SUM_FOCAL_BCE_POS_SUM] : row[SUM_BCE_POS_SUM];
    const double neg = focal ? row[SUM_FOCAL_BCE_NEG_SUM] : row[SUM_BCE_SUM] + row[SUM_BCE_NEG_SUM];
    // 0 leaves its part out, infinite losses included
    double value = own_pos != 0.0 ? own_pos * pos : 0.0;
    if (own_neg != 0.0) value += own_neg * neg;
    if (other_pos != 0.0) value += other_pos * row[SUM_BCE_FLIPPED_POS_SUM];
    if (other_neg != 0.0) value += other_neg * row[SUM_BCE_FLIPPED_NEG_SUM];
    double factor = weights[c] * share;
    total += factor * value;
    if (w.shape.reduction == REDUCTION_NONE) values[g] += factor * value;
    factor *= term[TERM_WEIGHT] * w.scale.of(n, c);
    w.add(n, c, focal ? COEFFICIENT_FOCAL_TARGET : COEFFICIENT_BCE_TARGET, factor * own_pos, factor * own_neg);
    w.add(n, c, COEFFICIENT_FLIPPED_TARGET, factor * other_pos, factor * other_neg);
    if (focal) w.set_gamma(n, c, term[TERM_GAMMA]);
  }
  return sum_for_all(total, w.buffer);
}

// What a sample's cross-entropy is divided by; `present`: it has a voxel that counts.
__device__ double ce_divisor(const Work& w, const double* term, const double* weights,
                             long long n, bool& present) {
  const int rule = int(term[TERM_NORMALIZE]);
  double row[SUM_NUMBER], total = 0.0, voxels = 0.0;
  for (long long c = 0; c < w.shape.classes; ++c) {
    w.collect(n, c, false, row);
    const double count = rule == NORMALIZE_ALL ? row[SUM_VOXELS] : row[SUM_COUNT];
    voxels = count > voxels ? count : voxels;
    if (weights[c] == weights[c]) total += weights[c] * row[SUM_TARGETS_SUM];
  }
  present = voxels > 0.0;
  return rule == NORMALIZE_WEIGHTS ? total : voxels;
}

__device__ double add_ce(const Work& w, const double* term, const double* weights,
                         double* values) {
  const bool summed = term[TERM_NORMALIZE] == NORMALIZE_SUM;
  const bool mean = w.shape.reduction == REDUCTION_MEAN;
  const double smoothing = term[TERM_SMOOTHING];
  const bool focal = term[TERM_KIND] == KIND_FOCAL_CROSS_ENTROPY;
  const long long classes = w.shape.classes, rows = w.shape.samples * classes;
  double row[SUM_NUMBER], kept = 0.0, whole = 0.0, total = 0.0;
  bool present;
  for (long long n = threadIdx.x; n < w.shape.samples; n += THREADS) {
    const double divisor = ce_divisor(w, term, weights, n, present);
    if (!present) continue;
    kept += 1.0;
    whole += divisor;
  }
  kept = sum_for_all(kept, w.buffer);
  whole = sum_for_all(whole, w.buffer);
  for (long long g = threadIdx.x; g < rows; g += THREADS) {
    const long long n = g / classes, c = g % classes;
    double divisor = ce_divisor(w, term, weights, n, present);
    if (focal) w.set_gamma(n, c, term[TERM_GAMMA]);  // of the voxel, whatever its class
    if (!present || weights[c] != weights[c]) continue;
    if (mean) divisor = whole;
    const double share = summed ? (mean ? 1.0 / kept : 1.0) : divisor != 0.0 ? 1.0 / divisor : 0.0;
    w.collect(n, c, false, row);
    const double factor = weights[c] * share;
    const double own = factor * (1.0 - smoothing), all = factor * smoothing / double(classes);
    double value = own != 0.0 ? own * row[focal ? SUM_FOCAL_CE_SUM : SUM_CE_SUM] : 0.0;
    if (all != 0.0) value += all * row[SUM_CE_UNIFORM_SUM];
    total += value;
    if (w.shape.reduction == REDUCTION_NONE) values[g] += value;
    const double scaled = term[TERM_WEIGHT] * w.scale.of(n, c);
    w.add(n, c, focal ? COEFFICIENT_FOCAL_TARGET : COEFFICIENT_BCE_TARGET, scaled * own, scaled * all);
  }
  return sum_for_all(total, w.buffer);
}

__device__ __forceinline__ bool known(double kind) {
  const bool of_sums = kind == KIND_BCE || kind == KIND_REGION || kind == KIND_CROSS_ENTROPY;
  const bool is_focal = kind == KIND_FOCAL_BCE || kind == KIND_FOCAL_CROSS_ENTROPY;
  return of_sums || is_focal || kind == KIND_LOVASZ;
}

// table: by value, or in `more` if there are more than NUMBERS numbers. sums: (samples, classes,
// columns). factor, factors (with type and strides): the gradient's scale. value: one, or (samples,
// classes) for reduction "none", float if `single`, else double; by_term: as many doubles for each
// term, or null unless the reduction is "none"; coefficients: (samples, classes, width).
// grid: 1.
__global__ void __launch_bounds__(THREADS, 1)
evaluate(const __grid_constant__ Table table, const double* more, const double* sums,
         double factor, const char* factors, long long code, long long stride_n,
         long long stride_c, long long terms, long long samples, long long classes,
         long long columns, long long reduction, bool single, void* value, double* by_term,
         double* coefficients, long long width) {
  __shared__ double buffer[WARPS], scan[2 * THREADS];
  const Scale scale = {factor, factors, code, stride_n, stride_c};
  const Shape shape = {terms, samples, classes, columns, reduction, width};
  const double* numbers = more == nullptr ? table.numbers : more;
  const long long rows = samples * classes, values = reduction == REDUCTION_NONE ? rows : 1;
  double invalid = 0.0;
  if (table.columns[SUM_INVALID] >= 0)
    for (long long i = threadIdx.x; i < rows; i += THREADS)
      invalid += sums[i * columns + table.columns[SUM_INVALID]];
  for (long long k = 0; k < terms; ++k)  // nobody wrote a branch for it
    if (!known(numbers[k * TERM_FIELDS + TERM_KIND])) invalid = 1.0;
  invalid = sum_for_all(invalid, buffer);
  const double start = invalid > 0.0 ? __longlong_as_double(0x7ff8000000000000LL) : 0.0;
  for (long long i = threadIdx.x; i < rows * width; i += THREADS) coefficients[i] = start;
  if (by_term != nullptr)
    for (long long i = threadIdx.x; i < values * terms; i += THREADS) by_term[i] = start;
  __syncthreads();
  const Work work = {sums, table.columns, scale, shape, coefficients, buffer};
  double sum = start;
  for (long long k = 0; k < terms; ++k) {
    const double* term = numbers + k * TERM_FIELDS;
    const double* weights = numbers + terms * TERM_FIELDS + k * classes;
    double* const results = by_term + k * values;
    double total = 0.0;
    const double kind = term[TERM_KIND];
    if (kind == KIND_BCE || kind == KIND_FOCAL_BCE) total = add_bce(work, term, weights, results);
    if (kind == KIND_CROSS_ENTROPY || kind == KIND_FOCAL_CROSS_ENTROPY)
      total = add_ce(work, term, weights, results);
    if (term[TERM_KIND] == KIND_REGION) total = add_region(work, term, weights, results);
    if (term[TERM_KIND] == KIND_LOVASZ) total = add_lovasz(work, term, weights, results, scan);
    sum += term[TERM_WEIGHT] * total;
    if (reduction != REDUCTION_NONE && by_term != nullptr && threadIdx.x == 0)
      results[0] = total + start;
    __syncthreads();  // another thread may have the row in the next term
  }
  for (long long i = threadIdx.x; i < values; i += THREADS) {
    if (reduction == REDUCTION_NONE) {
      sum = start;
      for (long long k = 0; k < terms; ++k)
        sum += numbers[k * TERM_FIELDS + TERM_WEIGHT] * by_term[k * values + i];
    }
    if (single) static_cast<float*>(value)[i] = float(sum);
    else static_cast<double*>(value)[i] = sum;
  }
}
