// The pass over x that gives mean, M2 and count.
#pragma once

#include <stdint.h>
#include <string.h>

#include "arguments.h"
#include "memory.h"
#include "running.h"
#include "sums.h"
#include "walk.h"

namespace {

constexpr int64_t FIRST_VALUES = 8;       // of a channel, for the first estimate of its mean
constexpr double CANCELLATION = 8;        // square of the shift's error over the variance that is summed anew

// The value that memory of type T holds. A shift like that leaves differences of few digits, whose sums round less: the
// digits of any other, the same in each difference, are rounded off in the same direction each time.
template <class T> double in_memory(double value) {
    using R = typename Arithmetic<T>::type;
    if constexpr (sizeof(T) == sizeof(R)) {
        return static_cast<T>(value);
    } else {
        float single_value = static_cast<float>(value), buffer;
        T stored;
        convert(&single_value, &stored, 1);
        return *load(&stored, &buffer, 1);
    }
}

// A first estimate of each channel's mean, from its first few values.
template <class T, class R> void estimate(const Walk &walk, const T *x, const R *mask, double *mean, double *seen) {
    memset(mean, 0, walk.channels * sizeof(double)), memset(seen, 0, walk.channels * sizeof(double));
    R buffer[FIRST_VALUES * SMALLEST_PLANE], weight;
    auto take = [&](int64_t at, int64_t channel, int64_t n) {
        const R *values = load(x + at, buffer, n);
        for (int64_t i = 0; i < n; ++i) {
            bool counts = !mask || *weights(mask, walk, at + i, 1, &weight) != 0;
            mean[channel] += counts ? values[i] : 0;
            seen[channel] += counts;
        }
    };
    if (walk.by_period && walk.repeats) {
        int64_t rows = smaller(walk.values / walk.channels, FIRST_VALUES);
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t c = 0; c < walk.channels; ++c) take(row * walk.channels + c, c, 1);
    } else {
        int64_t samples = walk.by_period ? smaller(walk.values / (walk.plane * walk.channels), FIRST_VALUES) : 1;
        for (int64_t plane = 0; plane < samples * walk.channels; ++plane)
            take(plane * walk.plane, plane % walk.channels, smaller(walk.plane, FIRST_VALUES));
    }
    for (int64_t c = 0; c < walk.channels; ++c)
        if (seen[c] > 0) mean[c] = in_memory<T>(mean[c] / seen[c]);
}

// Mean and M2 in double, for values whose squares float cannot hold. It is rare, so it is one simple thread.
template <class T, class R>
void in_double(Shape shape, const T *x, const R *mask, double count, double *mean, double *m2) {
    shape.threads = 1;
    Walk walk(shape, false);
    R buffer[SEGMENT], weight[SEGMENT];
    auto each = [&](auto take) {
        auto segment = [&](int64_t at, int64_t entry, int64_t n, int64_t = 1) {
            const R *values = load(x + at, buffer, n);
            const R *shares = mask ? weights(mask, walk, at, n, weight) : nullptr;
            for (int64_t i = 0; i < n; ++i) {
                double share = shares ? shares[i] : 1;
                if (share != 0) take(walk.channel(walk.by_period ? entry + i : entry), values[i], share);
            }
        };
        walk.by_period ? walk.periods(0, 1, segment) : walk.planes(0, segment);
    };
    memset(mean, 0, walk.channels * sizeof(double)), memset(m2, 0, walk.channels * sizeof(double));
    each([&](int64_t c, double value, double share) { mean[c] += share * value; });
    for (int64_t c = 0; c < walk.channels; ++c) mean[c] /= count;
    each([&](int64_t c, double value, double share) { m2[c] += share * (value - mean[c]) * (value - mean[c]); });
}

template <class T> struct Deviations {  // the operands of a segment
    using R = typename Arithmetic<T>::type;
    using M = typename InRegisters<T>::type;
    const T *x;
    const R *mask, *high;
    const Walk &walk;
    M *values;  // (threads, SEGMENT)
    R *weight;  // (threads, SEGMENT)
    bool in_place;

    Operands<M> operator()(int64_t thread, int64_t at, int64_t entry, int64_t n) const {
        Operands<M> of{};
        of.x = load(x + at, values + thread * SEGMENT, n);
        if (mask) of.mask = weights(mask, walk, at, n, weight + thread * SEGMENT);
        of.high = high + entry;
        return of;
    }
};

template <class T> int moments(const MomentsArguments &a) {
    using R = typename Arithmetic<T>::type;
    using M = typename InRegisters<T>::type;
    const T *x = static_cast<const T *>(a.x);
    const R *mask = static_cast<const R *>(a.mask);
    int64_t channels = a.shape.c, positions = a.shape.n * a.shape.s;
    double *mean = a.moments, *m2 = a.moments + channels, count = static_cast<double>(positions);
    if (mask) {
        count = 0;
        for (int64_t i = 0; i < positions; ++i) count += mask[i];
    }
    a.moments[2 * channels] = count;
    if (a.stamp) a.stamp.write(a.moments + 2 * channels + 1);
    if (!(count > 0) || channels == 0) {
        memset(a.moments, 0, 2 * channels * sizeof(double));
        return 0;
    }
    Walk walk(a.shape, false);
    Sums<M> sums(walk);
    Scratch scratch(Scratch::bytes<R>(walk.entries()) + 2 * walk.threads * Scratch::bytes<R>(SEGMENT));
    if (!sums.scratch || !scratch) return NO_MEMORY;
    R *high = scratch.array<R>(walk.entries());
    M *values = scratch.array<M>(walk.threads * SEGMENT);
    R *weight = scratch.array<R>(walk.threads * SEGMENT);
    Deviations<T> segment{x, mask, high, walk, values, weight, sizeof(T) == sizeof(M) && !mask};
    estimate<T, R>(walk, x, mask, mean, m2);
    for (int attempt = 0; attempt < 2; ++attempt) {
        expand(walk, mean, high);
        mask ? sums.template add_up<WEIGHTED_DEVIATION>(segment) : sums.template add_up<DEVIATION>(segment);
        bool good = true;
        for (int64_t c = 0; c < channels; ++c) {
            double off = sums.sum[c] / count, rest = sums.product[c] - sums.sum[c] * off;
            m2[c] = rest > 0 ? rest : rest != rest ? rest : 0;
            good = good && !(sums.sum[c] * off > CANCELLATION * m2[c]);
            mean[c] += off;
        }
        if (good) break;  // else once more about the mean, for the channels whose first values were unlike the rest
        if (attempt == 0)
            for (int64_t c = 0; c < channels; ++c) mean[c] = in_memory<T>(mean[c]);
    }
    bool finite = true;
    for (int64_t c = 0; c < channels; ++c) finite = finite && m2[c] - m2[c] == 0 && mean[c] - mean[c] == 0;
    if (!finite && sizeof(R) < sizeof(double)) in_double(a.shape, x, mask, count, mean, m2);
    if (a.stamp) pack(a.moments, channels);
    return 0;
}

}  // namespace
