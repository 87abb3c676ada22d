// The two passes over dy and x: the sums of the gradients, and the gradient of x.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <limits>

#include "activations.h"
#include "arguments.h"
#include "memory.h"
#include "normalize.h"
#include "signs.h"
#include "sums.h"
#include "walk.h"

namespace {

// Whether a pass takes dz from x and dy itself, so that it need not be there.
inline bool through_relu(const BackwardArguments &of, bool wants_dz) {
    return of.epilogue.activation == RELU && !of.epilogue.signs && !of.mask && !wants_dz;
}

// Whether x and dy, beside a mask, are all that it takes.
inline bool takes_x_and_dy(const BackwardArguments &of, bool wants_dz) {
    return through_relu(of, wants_dz) || (of.epilogue.activation == NONE && !of.epilogue.inplace);
}

// Of a segment: dz, the gradient of z, from dy, and x - mean where x is to be had from y.
template <class T, class M> struct Backward {
    using R = typename Arithmetic<T>::type;
    const T *dy, *x, *residual;
    const R *mask;
    const Epilogue &epilogue;
    const Walk &walk;
    Affine<R> &map;
    R *buffers;  // (threads, 5, SEGMENT)
    bool direct;    // x and dy are all that the pass takes
    bool in_place;  // as they lie in memory
    const R *slopes;  // (256, 8) where there are signs

    static int64_t bytes(const Walk &walk) { return Scratch::bytes<R>(5 * walk.threads * SEGMENT) + Scratch::bytes<R>(2048); }
    Backward(const BackwardArguments &of, const Walk &w, Affine<R> &affine, Scratch &scratch, bool wants_dz)
        : dy(static_cast<const T *>(of.dy)), x(static_cast<const T *>(of.x)),
          residual(static_cast<const T *>(of.epilogue.residual)), mask(static_cast<const R *>(of.mask)),
          epilogue(of.epilogue), walk(w), map(affine), buffers(scratch.array<R>(5 * w.threads * SEGMENT)),
          direct(takes_x_and_dy(of, wants_dz)), in_place(direct && !mask && sizeof(T) == sizeof(M)) {
        R *filled = scratch.array<R>(2048);
        if (epilogue.signs) fill_slopes<R>(epilogue.activation == LEAKY_RELU ? R(NEGATIVE_SLOPE) : 0, filled);
        slopes = filled;
    }

    Operands<M> operator()(int64_t thread, int64_t at, int64_t entry, int64_t n) const {
        R *buffer = buffers + 5 * thread * SEGMENT;
        M *values = reinterpret_cast<M *>(buffer);
        Operands<M> of{load(x + at, values, n), load(dy + at, values + SEGMENT, n), nullptr,
                       map.high + entry, map.scale + entry, map.shift + entry};
        if (mask) of.mask = weights(mask, walk, at, n, buffer + 2 * SEGMENT);
        if constexpr (sizeof(M) == sizeof(R))
            if (!direct) through_epilogue(of, map.inverse + entry, buffer + 3 * SEGMENT, buffer + 4 * SEGMENT, at, n);
        return of;
    }

  private:
    void through_epilogue(Operands<R> &of, const R *inverse, R *dz, R *centered, int64_t at, int64_t n) const {
        int64_t by = walk.by_period;  // 1: an entry a value
        R slope = epilogue.activation == LEAKY_RELU ? R(NEGATIVE_SLOPE) : epilogue.activation == RELU ? 0 : 1;
        const R *dy = of.dy, *x = of.x;
        if (epilogue.inplace) {
            SIMD for (int64_t i = 0; i < n; ++i) {
                R z = x[i] > 0 ? x[i] : x[i] / slope;
                dz[i] = x[i] > 0 ? dy[i] : dy[i] * slope;
                centered[i] = (z - of.shift[i * by]) * inverse[i * by];
            }
            of.x = centered;
        } else if (epilogue.signs) {
            slope == 0 ? through_signs<R, true>(epilogue.signs, slopes, dy, dz, at, n)
                       : through_signs<R, false>(epilogue.signs, slopes, dy, dz, at, n);
        } else if (epilogue.activation == RELU || epilogue.activation == LEAKY_RELU) {
            SIMD for (int64_t i = 0; i < n; ++i) {
                R z = (x[i] - of.high[i * by]) * of.scale[i * by] + of.shift[i * by];
                dz[i] = z > 0 ? dy[i] : dy[i] * slope;
            }
        } else {
            const R *added = residual ? load(residual + at, dz, n) : nullptr;
            SIMD for (int64_t i = 0; i < n; ++i) {
                R z = (x[i] - of.high[i * by]) * of.scale[i * by] + of.shift[i * by];
                centered[i] = added ? z + added[i] : z;
            }
            if (epilogue.activation == SILU) {
                SIMD for (int64_t i = 0; i < n; ++i) dz[i] = dy[i] * derivative<R>(SILU, centered[i]);
            } else {
                SIMD for (int64_t i = 0; i < n; ++i) dz[i] = dy[i] * derivative<R>(GELU_TANH, centered[i]);
            }
        }
        if (of.mask) {  // where nothing counts and no gradient comes, x may be no number
            SIMD for (int64_t i = 0; i < n; ++i) dz[i] = of.mask[i] == 0 && dy[i] == 0 ? 0 : dz[i];
        }
        of.dy = dz;
    }
};

template <class T, class M> int reduce_grad(const ReduceGradArguments &a) {
    using R = typename Arithmetic<T>::type;
    const BackwardArguments &of = a.of;
    int64_t channels = of.shape.c;
    if (a.stamp) a.stamp.write(a.sums + 2 * channels);
    if (of.shape.values() == 0) {
        memset(a.sums, 0, 2 * channels * sizeof(double));
        store(a.sums, channels, a.grad_weight);
        store(a.sums, channels, a.grad_bias);
        return 0;
    }
    Walk walk(of.shape, false);
    Sums<M> sums(walk);
    Scratch scratch(Affine<R>::bytes(walk) + Backward<T, M>::bytes(walk));
    if (!sums.scratch || !scratch) return NO_MEMORY;
    Affine<R> map(scratch, walk);
    map.template fill<T>(scratch, walk, of);
    Backward<T, M> segment(of, walk, map, scratch, false);
    if (of.mask) sums.template add_up<MASKED_GRADIENT>(segment);
    else if (through_relu(of, false)) sums.template add_up<GRADIENT_THROUGH_RELU>(segment);
    else sums.template add_up<GRADIENT>(segment);
    double *weight = sums.sums;  // no longer needed; (entries,) holds (C,)
    load(of.parameters.weight, channels, 1, weight);
    const double *mean = map.mean, *invstd = of.statistics + channels;
    double *sum = sums.sum, *product = sums.product;
    SIMD for (int64_t c = 0; c < channels; ++c) {
        double low = mean[c] - static_cast<R>(mean[c]);
        product[c] = (product[c] - low * sum[c]) * invstd[c];
        a.sums[c] = sum[c] * weight[c];
        a.sums[channels + c] = product[c] * weight[c];
    }
    store(product, channels, a.grad_weight);
    store(sum, channels, a.grad_bias);
    return 0;
}

template <class T> int reduce_grad(const ReduceGradArguments &a) {
    if (takes_x_and_dy(a.of, false)) return reduce_grad<T, typename InRegisters<T>::type>(a);
    return reduce_grad<T, typename Arithmetic<T>::type>(a);
}

// dx = scale * dz + slope * (x - high) + offset
template <class M, bool BY_PERIOD, bool THROUGH_RELU, bool MASKED, class R = typename Arithmetic<M>::type>
void grad_segment(const Operands<M> &of, const Affine<R> &map, int64_t entry, M *dx, int64_t n) {
    const R *slope = map.slope + entry, *offset = map.offset + entry;
    SIMD for (int64_t i = 0; i < n; ++i) {
        int64_t e = BY_PERIOD ? i : 0;
        R d = read(of.x[i]) - of.high[e], dz = read(of.dy[i]);
        if constexpr (THROUGH_RELU) dz = d * of.scale[e] + of.shift[e] > 0 ? dz : 0;
        R through = slope[e] * d + offset[e];
        if constexpr (MASKED) through = of.mask[i] == 0 ? 0 : of.mask[i] * through;
        write(of.scale[e] * dz + through, dx + i);
    }
}

constexpr double SMALL_INVSTD = 1e-15;  // of larger ones the squares are far from the limits of float

// The same in double, for a slope that has no float: of x with a variance above 1e38. It is rare, so it is simple.
template <class M>
void grad_in_double(const Operands<M> &of, const Walk &walk, const double *slope, const double *offset, bool relu,
                    int64_t entry, M *dx, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        int64_t e = walk.by_period ? i : 0, channel = walk.channel(entry + e);
        double d = static_cast<double>(read(of.x[i])) - of.high[e], dz = read(of.dy[i]);
        if (relu && !(d * of.scale[e] + of.shift[e] > 0)) dz = 0;
        double through = slope[channel] * d + offset[channel];
        if (of.mask) through = of.mask[i] == 0 ? 0 : of.mask[i] * through;
        write(static_cast<typename Arithmetic<M>::type>(of.scale[e] * dz + through), dx + i);
    }
}

template <class M>
using GradSegment = void (*)(const Operands<M> &, const Affine<typename Arithmetic<M>::type> &, int64_t, M *, int64_t);

template <class M, bool BY_PERIOD> GradSegment<M> grad_by(bool through_relu, bool masked) {
    if (masked) return grad_segment<M, BY_PERIOD, false, true>;
    return through_relu ? grad_segment<M, BY_PERIOD, true, false> : grad_segment<M, BY_PERIOD, false, false>;
}

template <class T, class M> int grad_input(const GradInputArguments &a) {
    using R = typename Arithmetic<T>::type;
    const BackwardArguments &of = a.of;
    if (of.shape.values() == 0) return 0;
    int64_t channels = of.shape.c;
    Walk walk(of.shape, false);
    Scratch scratch(Affine<R>::bytes(walk) + Backward<T, M>::bytes(walk) + Scratch::bytes<M>(4 * walk.threads * SEGMENT));
    if (!scratch) return NO_MEMORY;
    Affine<R> map(scratch, walk);
    map.template fill<T>(scratch, walk, of);
    double *slope = scratch.array<double>(channels), *offset = scratch.array<double>(channels);
    const double *mean = map.mean, *invstd = of.statistics + channels;
    double count = of.statistics[2 * channels] > 0 ? of.statistics[2 * channels] : 1;
    for (int64_t c = 0; c < channels; ++c) {
        double inside = 1 - a.eps_outside * invstd[c];  // 0 where all values are, at which x is too
        slope[c] = a.sums ? -invstd[c] * invstd[c] * a.sums[channels + c] / (count * (inside > 0 ? inside : 1)) : 0;
        offset[c] = a.sums && a.centered ? -invstd[c] * a.sums[c] / count : 0;
        offset[c] -= slope[c] * (mean[c] - static_cast<R>(mean[c]));
    }
    expand(walk, slope, map.slope);
    expand(walk, offset, map.offset);
    bool vanishes = false;
    for (int64_t c = 0; c < channels; ++c)
        vanishes = vanishes || (invstd[c] < SMALL_INVSTD && slope[c] != 0 && fabs(slope[c]) < std::numeric_limits<R>::min());
    Backward<T, M> segment(of, walk, map, scratch, a.dz);
    M *buffers = scratch.array<M>(4 * walk.threads * SEGMENT);
    bool relu = through_relu(of, a.dz);
    GradSegment<M> grad = walk.by_period ? grad_by<M, true>(relu, of.mask) : grad_by<M, false>(relu, of.mask);
    bool streams = streams_to(a.dx, walk.values * static_cast<int64_t>(sizeof(T)));
    in_parallel(walk.threads, [&](int64_t thread) {
        Fence fence;
        M *buffer = buffers + 4 * thread * SEGMENT;
        Result<T, M> dx(a.dx, streams, buffer), dz(a.dz, streams, buffer + 2 * SEGMENT);
        walk.backward(thread, [&](int64_t at, int64_t entry, int64_t n) {
            Operands<M> operands = segment(thread, at, entry, n);
            if (vanishes) grad_in_double(operands, walk, slope, offset, relu, entry, dx.place(at, n), n);
            else grad(operands, map, entry, dx.place(at, n), n);
            dx.put(at, n);
            if (a.dz) {
                M *to = dz.place(at, n);
                SIMD for (int64_t i = 0; i < n; ++i) to[i] = operands.dy[i];
                dz.put(at, n);
            }
        });
    });
    return 0;
}

template <class T> int grad_input(const GradInputArguments &a) {
    if (a.sums && !a.stamp.holds(a.sums + 2 * a.of.shape.c)) return MISMATCH;
    if (takes_x_and_dy(a.of, a.dz)) return grad_input<T, typename InRegisters<T>::type>(a);
    return grad_input<T, typename Arithmetic<T>::type>(a);
}

}  // namespace
