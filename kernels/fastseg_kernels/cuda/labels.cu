// Counts of label volumes: hard Jaccard and Dice of many classes in one read.
//
// Counts are integers, so the order in which they are added up does not matter. Labels come in runs:
// a thread counts equal pairs in registers and adds them to a table when the pair changes. The table
// is in shared memory, where there is room for it, and is added to that of the sample once a task.
#include "operands.cuh"

typedef unsigned long long Count;
enum { HITS, PREDICTED, TRUE_ONES, VALID, INVALID_PREDICTED, INVALID_TARGET, COUNTS };
constexpr int PER_CLASS = VALID;  // counts that every class has; the others are the sample's

// A label of any type; what is not an integer (0.5, NaN) is no label, and nothing to ignore.
__device__ __forceinline__ long long read_label(const char* address, long long code) {
  if (code < CODE_FLOAT16) return read_integer(address, code);
  constexpr long long NO_LABEL = -9223372036854775807LL - 1;
  const double value = read_real<double>(address, code);
  if (!(fabs(value) < 9007199254740992.0)) return NO_LABEL;
  const long long label = (long long)value;
  return double(label) == value ? label : NO_LABEL;
}

// Equal pairs of labels, and where they are counted: C is the type of the table's numbers, `width`
// how many it has for each class.
template <typename C>
struct Pairs {
  C *table, *others;
  long long classes, width, p = 0, t = 0;
  unsigned number = 0;

  __device__ Pairs(C* table, C* others, long long classes, long long width)
      : table(table), others(others), classes(classes), width(width) {}

  __device__ __forceinline__ void add(long long predicted, long long target) {
    if (predicted != p || target != t) flush();
    p = predicted;
    t = target;
    ++number;
  }

  __device__ __forceinline__ void flush() {
    if (number == 0) return;
    const bool known_p = p >= 0 && p < classes, known_t = t >= 0 && t < classes;
    atomicAdd(others, C(number));
    atomicAdd(known_p ? table + p * width + PREDICTED : others + 1, C(number));
    atomicAdd(known_t ? table + t * width + TRUE_ONES : others + 2, C(number));
    if (known_p && p == t) atomicAdd(table + p * width + HITS, C(number));
    number = 0;
  }
};

template <typename I, typename C>
__device__ __forceinline__ void count_task(const Job& job, const Place& row, long long first,
                                           long long end, Pairs<C> pairs) {
  for (long long start = first; start < end; start += THREADS * GROUP) {
    for (int k = 0; k < GROUP; ++k) {
      const long long i = start + 4 * threadIdx.x + k / 4 * (4 * THREADS) + k % 4;
      if (i >= end) continue;
      const Place at = row.voxel(job, I(i));
      const long long p = read_label(job.logits.address + at.logits, job.logits.code);
      const long long t = read_label(job.targets.address + at.targets, job.targets.code);
      if (job.has_ignore && t == job.ignore_label) continue;
      if (job.mask.address != nullptr &&
          read_integer(job.mask.address + at.mask, job.mask.code) == 0)
        continue;
      pairs.add(p, t);
    }
  }
  pairs.flush();
}

// counts: (samples, job.classes, COUNTS), zero before. The last three are counted with class 0.
// grid: at most the tasks; block: THREADS. Job's classes are those of the labels: they have no class
// axis. I: counts the voxels of a row.
template <typename I>
__global__ void __launch_bounds__(THREADS)
count_labels(const __grid_constant__ Job job, Count* counts) {
  __shared__ unsigned table[PER_CLASS * LABEL_CLASSES], others[COUNTS - PER_CLASS];
  const bool shared = job.classes <= LABEL_CLASSES;
  const long long words = shared ? PER_CLASS * job.classes : 0;
  for (long long k = threadIdx.x; k < words; k += THREADS) table[k] = 0;
  if (threadIdx.x < COUNTS - PER_CLASS) others[threadIdx.x] = 0;
  __syncthreads();
  for (unsigned task = blockIdx.x; task < job.tasks; task += gridDim.x) {
    const unsigned in_row = unsigned(job.row_tasks);
    const long long n = task / in_row, first = task % in_row * job.task_voxels;
    const long long end = first + job.task_voxels < job.voxels ? first + job.task_voxels : job.voxels;
    const Place row(job, n, 0);
    Count* const of_sample = counts + n * job.classes * COUNTS;
    if (!shared) {
      count_task<I>(job, row, first, end,
                    Pairs<Count>(of_sample, of_sample + VALID, job.classes, COUNTS));
      continue;
    }
    count_task<I>(job, row, first, end, Pairs<unsigned>(table, others, job.classes, PER_CLASS));
    __syncthreads();
    for (long long k = threadIdx.x; k < words; k += THREADS) {
      if (table[k] == 0) continue;
      atomicAdd(of_sample + k / PER_CLASS * COUNTS + k % PER_CLASS, Count(table[k]));
      table[k] = 0;
    }
    if (threadIdx.x < COUNTS - PER_CLASS) {
      atomicAdd(of_sample + VALID + threadIdx.x, Count(others[threadIdx.x]));
      others[threadIdx.x] = 0;
    }
    __syncthreads();
  }
}
