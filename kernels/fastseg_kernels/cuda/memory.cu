// Small tables from the host, and memory that is set to zero.

struct Words {
  long long words[480];
};

// Writes the first `count` words. grid: 1.
extern "C" __global__ void upload(long long* to, int count, const __grid_constant__ Words from) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from.words[i];
}

// Sets `size` bytes to 0, an address of 16 bytes' alignment. grid: any.
extern "C" __global__ void clear(char* to, long long size) {
  const long long step = 16LL * blockDim.x * gridDim.x;
  for (long long i = 16 * (blockIdx.x * (long long)blockDim.x + threadIdx.x); i < size; i += step) {
    if (i + 16 <= size) *reinterpret_cast<uint4*>(to + i) = uint4{0, 0, 0, 0};
    else for (long long j = i; j < size; ++j) to[j] = 0;
  }
}
