// The tile registers of AMX, whose numbers must be constants. Compilers do not see their reads: every
// write must have reached memory by then.

#pragma once

#include <cstdint>
#include <type_traits>

namespace mnemosyne {

// Where the halves of a vector go when its elements are put in pairs.
alignas(64) const uint16_t PAIRED[32] = {0, 16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                         21, 6, 22, 7,  23, 8,  24, 9,  25, 10, 26,
                                         11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

struct TileConfig {  // of the register: all tiles of 16 rows of 64 bytes
  uint8_t palette = 1, start_row = 0, unused[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void configure_tiles(const TileConfig& config) {
  asm volatile("ldtilecfg %0" ::"m"(config));
}

inline void release_tiles() { asm volatile("tilerelease"); }

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

template <int T>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

// C += A B: rows of A by columns of B, products of even and of odd elements summed apart.
template <int C, int A, int B>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Call body with 0 to N - 1 as compile-time constants.
template <int N, typename Body>
inline void for_each(Body body) {
  if constexpr (N > 0) {
    for_each<N - 1>(body);
    body(std::integral_constant<int, N - 1>());
  }
}

}  // namespace mnemosyne
