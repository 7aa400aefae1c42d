// 16-bit floats, with the bits of numpy.float16 and ml_dtypes.bfloat16.
#pragma once
#include <bit>
#include <cstdint>

struct __half {
  std::uint16_t bits;
};
struct __nv_bfloat16 {
  std::uint16_t bits;
};

inline float __half2float(__half value) { return float(std::bit_cast<_Float16>(value.bits)); }
inline __half __float2half_rn(float value) {
  return {std::bit_cast<std::uint16_t>(_Float16(value))};
}
inline float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(std::uint32_t(value.bits) << 16);
}
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (value != value) return {0x7fff};
  return {std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
