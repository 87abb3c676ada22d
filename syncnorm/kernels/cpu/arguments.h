// The arguments of the passes, one struct each.
#pragma once

#include <stdint.h>

namespace {

enum Failure { NO_MEMORY = 1, MISMATCH };  // what a function returns that fails, before it writes anything

enum Dtype : int64_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, BYTE, LONG, OTHER };
enum Activation : int64_t { NONE, RELU, LEAKY_RELU, SILU, GELU_TANH };

struct Shape {
    int64_t n, c, s, channels_last, dtype, threads;
    int64_t values() const { return n * c * s; }
};

struct PerChannel {  // a vector (C,)
    void *data;  // or null
    int64_t dtype, stride;
};
struct Parameters {  // of the layer
    PerChannel weight, bias;
};

struct Epilogue {
    int64_t activation;
    const void *residual;  // like x, or null
    uint8_t *signs;        // (ceil(values / 8),) or null
    int64_t inplace;       // x is y
};

struct Stamp {  // of a message; see ../vectors.py
    int64_t number;
    int64_t ranks;  // 0: there is no stamp

    explicit operator bool() const { return ranks; }
    void write(double *tail) const {  // (2,)
        tail[0] = static_cast<double>(number), tail[1] = static_cast<double>(number * number);
    }
    bool holds(const double *tail) const {  // of the sum over the ranks
        return !ranks || (tail[0] == static_cast<double>(ranks * number) &&
                          tail[1] == static_cast<double>(ranks * number * number));
    }
};

struct MomentsArguments {
    Shape shape;
    const void *x;
    const void *mask;  // (N, S) in the type of the arithmetic, or null
    double *moments;   // [mean, M2, n]; with a stamp [n mean, M2 + n mean², n, number, number²]
    Stamp stamp;
};

struct Running {  // statistics
    bool given;
    PerChannel mean, var;
    int64_t *batches;  // or null
    bool cumulative;
    double momentum;
};

struct NormalizeArguments {
    Shape shape;
    const void *x;
    void *y;
    const double *moments;  // as above, with a stamp their sums over its ranks
    Stamp stamp;
    Parameters parameters;
    double eps;
    int64_t eps_outside;
    Epilogue epilogue;
    double *statistics;  // (2C + 1,)
    Running running;
};

struct BackwardArguments {  // what both passes of the backward read
    Shape shape;
    const void *dy, *x;
    const double *statistics;  // (2C + 1,)
    Parameters parameters;
    Epilogue epilogue;
    const void *mask;
};

struct ReduceGradArguments {
    BackwardArguments of;
    PerChannel grad_weight, grad_bias;
    double *sums;  // (2C,); with a stamp [sums, number, number²]
    Stamp stamp;
};

// Of the passes that sum in fixed point, see fixed_point.h.
struct InputArguments {
    Shape shape;
    const void *x, *mask;
    const double *origins;  // (2, C), of w x and w x²; or null, for the largest values
    double *result;         // sums of 2 digits, of double 5, (2, C) each; or largest values, (C,)
};

struct GradientArguments {
    BackwardArguments of;
    const double *origins;  // (2, C), of dz and dz (x - mean); or null
    double *result;         // sums of 2 digits, of double 4, (2, C) each; or largest values, (2, C)
};

struct GradInputArguments {
    BackwardArguments of;
    const double *sums;  // as above, with a stamp their sums over its ranks; or null
    Stamp stamp;
    int64_t centered;
    double eps_outside;
    void *dx;
    void *dz;  // like x, or null
};

}  // namespace
