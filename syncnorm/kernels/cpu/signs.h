// The signs of z as bits, which are all that backward needs of z for a ReLU after a residual.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dtypes.h"

namespace {

inline unsigned eight_signs(const float *z) {  // bit k: z[k] > 0
#if defined(__AVX__)
    return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(z), _mm256_setzero_ps(), _CMP_GT_OQ));
#else
    unsigned signs = 0;
    for (int k = 0; k < 8; ++k) signs |= static_cast<unsigned>(z[k] > 0) << k;
    return signs;
#endif
}

inline unsigned eight_signs(const double *z) {
    unsigned signs = 0;
    for (int k = 0; k < 8; ++k) signs |= static_cast<unsigned>(z[k] > 0) << k;
    return signs;
}

// Bit i % 8 of byte i / 8 is the sign of value i; eight of them may begin at any bit.
template <class R> void write_signs(const R *z, uint8_t *bits, int64_t at, int64_t n) {  // bits are 0 before
    uint8_t *byte = bits + at / 8;
    unsigned bit = static_cast<unsigned>(at % 8);
    int64_t i = 0;
    if (bit == 0) {
        for (; i + 8 <= n; i += 8) *byte++ = static_cast<uint8_t>(eight_signs(z + i));
    } else {
        for (; i + 8 <= n; i += 8) {
            unsigned both = eight_signs(z + i) << bit;
            *byte++ |= static_cast<uint8_t>(both);
            *byte |= static_cast<uint8_t>(both >> 8);
        }
    }
    for (; i < n; ++i) bits[(at + i) / 8] |= static_cast<uint8_t>((z[i] > 0) << (at + i) % 8);
}

template <class R> struct Bits { typedef uint32_t type __attribute__((may_alias)); };
template <> struct Bits<double> { typedef uint64_t type __attribute__((may_alias)); };

// What the gradients of eight values at a time are multiplied by: 1 where the sign is set, else the slope. If that is 0,
// what they are masked by, all bits or none: they may be infinite.
template <class R> void fill_slopes(R slope, R *slopes) {  // (256, 8)
    for (int byte = 0; byte < 256; ++byte)
        for (int bit = 0; bit < 8; ++bit) {
            R *to = slopes + byte * 8 + bit;
            *to = byte >> bit & 1 ? 1 : slope;
            if (slope == 0) memset(to, byte >> bit & 1 ? 0xff : 0, sizeof(R));
        }
}

template <class R, bool MASKS>
void through_signs(const uint8_t *bits, const R *slopes, const R *dy, R *dz, int64_t at, int64_t n) {
    using B = typename Bits<R>::type;
    const uint8_t *byte = bits + at / 8;
    unsigned bit = static_cast<unsigned>(at % 8);
    auto take = [&](int64_t i, const R *slope) __attribute__((always_inline)) {
        if constexpr (MASKS)
            *reinterpret_cast<B *>(dz + i) = *reinterpret_cast<const B *>(dy + i) & *reinterpret_cast<const B *>(slope);
        else
            dz[i] = dy[i] * *slope;
    };
    int64_t i = 0;
    for (; i + 8 <= n; i += 8, ++byte) {
        const R *eight = slopes + (bit == 0 ? *byte : ((*byte | byte[1] << 8) >> bit & 0xff)) * 8;
        SIMD for (int j = 0; j < 8; ++j) take(i + j, eight + j);
    }
    for (; i < n; ++i) take(i, slopes + (bits[(at + i) / 8] >> (at + i) % 8 & 1 ? 255 * 8 : 0));
}

}  // namespace
