// Arguments of the kernels of linear layers, and the function of a gate.

#pragma once

#include "tiles.h"

namespace mnemosyne {

struct Part {  // one layer, as the caller's table has it
  const bf16* w;
  const bf16* bias;  // or null
  int64_t num_outputs;
};

struct Call {  // as Python lays it out
  const bf16* x;
  int64_t x_stride;
  const Part* parts;
  int64_t num_parts;
  bf16* y;
  int64_t num_rows, num_columns, num_threads;
};

inline __m512 silu(__m512 x) {
  const __m512 e = exp2_of(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504088896340736f)));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

}  // namespace mnemosyne
