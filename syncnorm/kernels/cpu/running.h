// What is per channel alone: the packed form of the moments, and the running statistics.
#pragma once

#include <stdint.h>

#include "arguments.h"
#include "dtypes.h"

namespace {

// Of mean, M2 and n: n mean, M2 + n mean², n; in place.
inline void pack(double *moments, int64_t channels) {
    double count = moments[2 * channels];
    SIMD for (int64_t c = 0; c < channels; ++c) {
        double mean = moments[c], total = count * mean;
        moments[c] = total;
        moments[channels + c] += total * mean;
    }
}

// The inverse, to another place.
inline void unpack(const double *packed, int64_t channels, double *moments) {
    double count = packed[2 * channels], divisor = count > 0 ? count : 1;
    moments[2 * channels] = count;
    SIMD for (int64_t c = 0; c < channels; ++c) {
        double mean = packed[c] / divisor, m2 = packed[channels + c] - packed[c] * mean;
        moments[c] = mean;
        moments[channels + c] = m2 > 0 ? m2 : m2 != m2 ? m2 : 0;
    }
}

inline void move(const PerChannel &buffer, const double *batch, double divisor, double factor, int64_t channels) {
    with_type(buffer, [&](auto *values) {
        for (int64_t c = 0; c < channels; ++c) {
            auto &value = values[c * buffer.stride];
            const double before = number(value);
            assign(before + factor * (batch[c] / divisor - before), value);
        }
    });
}

inline void update_running(const Running &running, const double *moments, int64_t channels) {
    const double count = moments[2 * channels];
    if (!(count > 0)) return;
    if (running.batches) ++*running.batches;
    const double factor = running.cumulative ? 1 / static_cast<double>(*running.batches) : running.momentum;
    move(running.mean, moments, 1, factor, channels);
    move(running.var, moments + channels, count > 1 ? count - 1 : 1, factor, channels);
}

}  // namespace
