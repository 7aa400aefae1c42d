// Counts of label volumes: hard Jaccard and Dice of many classes in one read.
//
// Counts are integers, so the order in which they are added up does not matter.
#include "operands.cuh"

typedef unsigned long long Count;
enum { HITS, PREDICTED, TRUE_ONES, VALID, INVALID_PREDICTED, INVALID_TARGET, COUNTS };

// A label of any type; what is not an integer (0.5, NaN) is no label, and nothing to ignore.
__device__ __forceinline__ long long read_label(const char* address, long long code) {
  if (code < CODE_FLOAT16) return read_integer(address, code);
  constexpr long long NO_LABEL = -9223372036854775807LL - 1;
  const double value = read_real<double>(address, code);
  if (!(fabs(value) < 9007199254740992.0)) return NO_LABEL;
  const long long label = (long long)value;
  return double(label) == value ? label : NO_LABEL;
}

// counts: (samples, job.classes, COUNTS), zero before. The last three are counted with class 0.
// grid: tasks; block: THREADS. Job's classes are those of the labels: they have no class axis.
__global__ void __launch_bounds__(THREADS) count_labels(const Job job, Count* counts) {
  const long long tasks = job.samples * job.blocks;
  for (long long task = blockIdx.x; task < tasks; task += gridDim.x) {
    const long long n = task / job.blocks, first = task % job.blocks * job.block;
    const long long end = first + job.block < job.voxels ? first + job.block : job.voxels;
    Count* const table = counts + n * job.classes * COUNTS;
    for (long long i = first + threadIdx.x; i < end; i += THREADS) {
      const long long p = read_label(locate(job.logits, job, n, 0, i), job.logits.code);
      const long long t = read_label(locate(job.targets, job, n, 0, i), job.targets.code);
      if (job.has_ignore && t == job.ignore_label) continue;
      if (job.mask.address != nullptr &&
          read_integer(locate(job.mask, job, n, 0, i), job.mask.code) == 0)
        continue;
      const bool known_p = p >= 0 && p < job.classes, known_t = t >= 0 && t < job.classes;
      atomicAdd(table + VALID, Count(1));
      atomicAdd(table + (known_p ? p * COUNTS + PREDICTED : INVALID_PREDICTED), Count(1));
      atomicAdd(table + (known_t ? t * COUNTS + TRUE_ONES : INVALID_TARGET), Count(1));
      if (known_p && p == t) atomicAdd(table + p * COUNTS + HITS, Count(1));
    }
  }
}
