// The pass over x that writes y = activation((x - mean) * invstd * weight + bias + residual).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "activations.h"
#include "arguments.h"
#include "memory.h"
#include "running.h"
#include "signs.h"
#include "walk.h"

namespace {

constexpr double LEAST_NOISE = 0x1p-126;  // times invstd: float holds the inverse of what is not below it

// The arrays by entry that the passes over the data read.
template <class R> struct Affine {
    R *high, *scale, *shift, *slope, *offset, *inverse;
    const double *mean;  // (C,)

    static int64_t bytes(const Walk &walk) {
        return 6 * Scratch::bytes<R>(walk.entries()) + 7 * Scratch::bytes<double>(walk.channels);
    }
    Affine(Scratch &scratch, const Walk &walk)
        : high(scratch.array<R>(walk.entries())), scale(scratch.array<R>(walk.entries())),
          shift(scratch.array<R>(walk.entries())), slope(scratch.array<R>(walk.entries())),
          offset(scratch.array<R>(walk.entries())), inverse(scratch.array<R>(walk.entries())) {}

    // The passes of the backward. In place x - mean is computed from y, and takes the place of x: then the mean is 0.
    template <class T> void fill(Scratch &scratch, const Walk &walk, const BackwardArguments &of) {
        mean = of.statistics;
        if (of.epilogue.inplace) {
            invert<T>(scratch, walk, of);
            double *zeros = scratch.array<double>(walk.channels);
            memset(zeros, 0, walk.channels * sizeof(double));
            mean = zeros;
        }
        fill(scratch, walk, mean, of.statistics + walk.channels, of.parameters);
    }
    // high: the mean; its rest, which R cannot hold beside it, goes into the shift: z = (x - high) * scale + shift
    void fill(Scratch &scratch, const Walk &walk, const double *mean, const double *invstd, const Parameters &of) {
        int64_t channels = walk.channels;
        double *w = scratch.array<double>(channels), *b = scratch.array<double>(channels);
        load(of.weight, channels, 1, w);
        load(of.bias, channels, 0, b);
        SIMD for (int64_t c = 0; c < channels; ++c) {
            w[c] *= invstd[c];
            b[c] -= (mean[c] - static_cast<R>(mean[c])) * w[c];
        }
        expand(walk, mean, high);
        expand(walk, w, scale);
        expand(walk, b, shift);
    }

  private:
    // inverse: what z - bias is multiplied by to give x - mean, damped where the weight is below what rounding z to T
    // has added to it; reference.py says how.
    template <class T> void invert(Scratch &scratch, const Walk &walk, const BackwardArguments &of) {
        int64_t channels = walk.channels;
        const double *invstd = of.statistics + channels;
        double least = Precision<T>::tiny / (of.epilogue.activation == LEAKY_RELU ? NEGATIVE_SLOPE : 1);
        double *w = scratch.array<double>(channels), *b = scratch.array<double>(channels);
        load(of.parameters.weight, channels, 1, w);
        load(of.parameters.bias, channels, 0, b);
        for (int64_t c = 0; c < channels; ++c) {
            double scale = w[c] * invstd[c], noise = Precision<T>::eps / sqrt(12.0) * (fabs(b[c]) + least) * invstd[c];
            if (noise < LEAST_NOISE) noise = LEAST_NOISE;
            w[c] = scale / (scale * scale + noise * noise);
        }
        expand(walk, w, inverse);
    }
};

template <class M, int64_t ACTIVATION, bool BY_PERIOD, bool RESIDUAL, class R = typename Arithmetic<M>::type>
void affine(const M *x, const M *residual, M *y, int64_t n, const Affine<R> &of, int64_t entry) {
    const R *high = of.high + entry, *scale = of.scale + entry, *shift = of.shift + entry;
    SIMD for (int64_t i = 0; i < n; ++i) {
        int64_t e = BY_PERIOD ? i : 0;
        R z = (read(x[i]) - high[e]) * scale[e] + shift[e];
        if constexpr (RESIDUAL) z += read(residual[i]);
        write(activate<R, ACTIVATION>(z), y + i);
    }
}

template <class M>
using AffineSegment =
    void (*)(const M *, const M *, M *, int64_t, const Affine<typename Arithmetic<M>::type> &, int64_t);

template <class M, int64_t ACTIVATION> AffineSegment<M> affine_with(bool by_period, bool residual) {
    if (by_period) return residual ? affine<M, ACTIVATION, true, true> : affine<M, ACTIVATION, true, false>;
    return residual ? affine<M, ACTIVATION, false, true> : affine<M, ACTIVATION, false, false>;
}

template <class M> AffineSegment<M> affine_segment(int64_t activation, bool by_period, bool residual) {
    switch (activation) {
        case RELU: return affine_with<M, RELU>(by_period, residual);
        case LEAKY_RELU: return affine_with<M, LEAKY_RELU>(by_period, residual);
        case SILU: return affine_with<M, SILU>(by_period, residual);
        case GELU_TANH: return affine_with<M, GELU_TANH>(by_period, residual);
        default: return affine_with<M, NONE>(by_period, residual);
    }
}

// Of moments: the statistics, and the running statistics if they are given. Nothing fails after this.
inline void to_statistics(const NormalizeArguments &a) {
    int64_t channels = a.shape.c;
    double *invstd = a.statistics + channels;
    if (a.stamp) unpack(a.moments, channels, a.statistics);
    else if (a.statistics != a.moments) memcpy(a.statistics, a.moments, (2 * channels + 1) * sizeof(double));
    if (a.running.given) update_running(a.running, a.statistics, channels);
    double count = a.statistics[2 * channels] > 0 ? a.statistics[2 * channels] : 1;
    SIMD for (int64_t c = 0; c < channels; ++c) {
        double variance = invstd[c] / count;  // of M2, whose place it takes
        invstd[c] = a.eps_outside ? 1 / (sqrt(variance) + a.eps) : 1 / sqrt(variance + a.eps);
    }
}

template <class T, class M> int normalize(const NormalizeArguments &a) {
    using R = typename Arithmetic<T>::type;
    int64_t channels = a.shape.c;
    if (a.shape.values() == 0) {
        to_statistics(a);
        return 0;
    }
    const T *x = static_cast<const T *>(a.x), *residual = static_cast<const T *>(a.epilogue.residual);
    uint8_t *signs = a.epilogue.signs;
    Walk walk(a.shape, signs);
    Scratch scratch(Affine<R>::bytes(walk) + 4 * walk.threads * Scratch::bytes<M>(SEGMENT));
    if (!scratch) return NO_MEMORY;
    to_statistics(a);
    Affine<R> map(scratch, walk);
    map.fill(scratch, walk, a.statistics, a.statistics + channels, a.parameters);
    M *buffers = scratch.array<M>(4 * walk.threads * SEGMENT);
    if (signs) memset(signs, 0, (a.shape.values() + 7) / 8);
    AffineSegment<M> affine = affine_segment<M>(a.epilogue.activation, walk.by_period, residual);
    bool streams = a.y != a.x && streams_to(a.y, walk.values * static_cast<int64_t>(sizeof(T)));
    in_parallel(walk.threads, [&](int64_t thread) {
        Fence fence;
        M *buffer = buffers + 4 * thread * SEGMENT;
        Result<T, M> y(a.y, streams, buffer);
        walk.backward(thread, [&](int64_t at, int64_t entry, int64_t n) {
            const M *added = residual ? load(residual + at, buffer + 2 * SEGMENT, n) : nullptr;
            M *segment = y.place(at, n);
            affine(load(x + at, buffer + 3 * SEGMENT, n), added, segment, n, map, entry);
            if constexpr (sizeof(M) == sizeof(R))
                if (signs) write_signs(segment, signs, at, n);  // y has the sign of z
            y.put(at, n);
        });
    });
    return 0;
}

template <class T> int normalize(const NormalizeArguments &a) {
    if (!a.stamp.holds(a.moments + 2 * a.shape.c + 1)) return MISMATCH;
    if (a.epilogue.signs) return normalize<T, typename Arithmetic<T>::type>(a);  // of z before it is rounded
    return normalize<T, typename InRegisters<T>::type>(a);
}

}  // namespace
