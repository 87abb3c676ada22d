// The calls of binding.py: the arguments of each function, in their order there.
#pragma once

#include "arguments.h"
#include "objects.h"

namespace {

inline Shape shape_of(const Tensor &x, Values &values) {
    const int64_t channels_last = values.integer();
    return {x.n, x.c, x.s, channels_last, x.dtype, values.integer()};
}

inline void read(Values &values, Stamp &stamp) {
    if (values.is_none()) {
        stamp = {};
        return;
    }
    Values of = values.tuple();
    stamp.number = of.integer();
    stamp.ranks = of.integer();
}

inline void read(Values &values, Parameters &parameters, const Shape &shape) {
    parameters.weight = values.tensor().vector(shape.c);
    parameters.bias = values.tensor().vector(shape.c);
}

inline void read(Values &values, Epilogue &epilogue, const Shape &shape) {
    epilogue.activation = values.integer();
    epilogue.residual = values.pointer<void>(shape.dtype, shape.values());
    epilogue.signs = values.pointer<uint8_t>(BYTE, (shape.values() + 7) / 8);
    epilogue.inplace = values.integer();
}

inline void read(Values &values, Running &running, const Shape &shape) {
    running = {};
    if (values.is_none()) return;
    Values of = values.tuple();
    running.given = true;
    running.mean = of.tensor().vector(shape.c);
    running.var = of.tensor().vector(shape.c);
    running.batches = of.pointer<int64_t>(LONG, 1);
    running.cumulative = of.is_none();
    if (!running.cumulative) running.momentum = of.number();
}

inline const void *mask_of(Values &values, const Shape &shape) {
    return values.pointer<void>(shape.dtype == FLOAT64 ? FLOAT64 : FLOAT32, shape.n * shape.s);
}

inline int64_t stamped(int64_t size, const Stamp &stamp) { return stamp ? size + 2 : size; }

inline void read(Values &values, MomentsArguments &arguments) {
    const Tensor x = values.tensor();
    arguments.x = x.data;
    const Shape shape = arguments.shape = shape_of(x, values);
    arguments.mask = mask_of(values, shape);
    const Tensor moments = values.tensor();
    read(values, arguments.stamp);
    arguments.moments = static_cast<double *>(moments.of(FLOAT64, stamped(2 * shape.c + 1, arguments.stamp)));
}

inline void read(Values &values, InputArguments &arguments) {
    const Tensor x = values.tensor();
    arguments.x = x.data;
    const Shape shape = arguments.shape = shape_of(x, values);
    arguments.mask = mask_of(values, shape);
    arguments.origins = values.pointer<double>(FLOAT64, 2 * shape.c);
    const int64_t results = !arguments.origins ? 1 : shape.dtype == FLOAT64 ? 10 : 4;
    arguments.result = values.pointer<double>(FLOAT64, results * shape.c);
}

inline void read(Values &values, NormalizeArguments &arguments) {
    const Tensor x = values.tensor();
    arguments.x = x.data;
    const Shape shape = arguments.shape = shape_of(x, values);
    arguments.y = values.pointer<void>(shape.dtype, shape.values());
    const Tensor moments = values.tensor();
    read(values, arguments.stamp);
    arguments.moments = static_cast<double *>(moments.of(FLOAT64, stamped(2 * shape.c + 1, arguments.stamp)));
    read(values, arguments.parameters, shape);
    arguments.eps = values.number();
    arguments.eps_outside = values.integer();
    read(values, arguments.epilogue, shape);
    arguments.statistics = values.pointer<double>(FLOAT64, 2 * shape.c + 1);
    read(values, arguments.running, shape);
}

inline void read(Values &values, BackwardArguments &arguments) {
    const Tensor x = values.tensor();
    arguments.x = x.data;
    const Shape shape = arguments.shape = shape_of(x, values);
    arguments.dy = values.pointer<void>(shape.dtype, shape.values());
    arguments.statistics = values.pointer<double>(FLOAT64, 2 * shape.c + 1);
    read(values, arguments.parameters, shape);
    read(values, arguments.epilogue, shape);
    arguments.mask = mask_of(values, shape);
}

inline void read(Values &values, ReduceGradArguments &arguments) {
    Values of = values.tuple();
    read(of, arguments.of);
    const int64_t channels = arguments.of.shape.c;
    arguments.grad_weight = values.tensor().vector(channels);
    arguments.grad_bias = values.tensor().vector(channels);
    const Tensor sums = values.tensor();
    read(values, arguments.stamp);
    arguments.sums = static_cast<double *>(sums.of(FLOAT64, stamped(2 * channels, arguments.stamp)));
}

inline void read(Values &values, GradientArguments &arguments) {
    Values of = values.tuple();
    read(of, arguments.of);
    const Shape &shape = arguments.of.shape;
    arguments.origins = values.pointer<double>(FLOAT64, 2 * shape.c);
    const int64_t results = !arguments.origins ? 2 : shape.dtype == FLOAT64 ? 8 : 4;
    arguments.result = values.pointer<double>(FLOAT64, results * shape.c);
}

inline void read(Values &values, GradInputArguments &arguments) {
    Values of = values.tuple();
    read(of, arguments.of);
    const Shape &shape = arguments.of.shape;
    const Tensor sums = values.tensor();
    read(values, arguments.stamp);
    arguments.sums = static_cast<double *>(sums.of(FLOAT64, stamped(2 * shape.c, arguments.stamp)));
    arguments.centered = values.integer();
    arguments.eps_outside = values.number();
    arguments.dx = values.pointer<void>(shape.dtype, shape.values());
    arguments.dz = values.pointer<void>(shape.dtype, shape.values());
}

// Whether an input (N, C, *) and the vectors after it are plain tensors on the CPU, the vectors of shape (C,) and all
// floating point, and the last one has one value, of any dtype. Each but the input may be None. False if torch cannot
// say it quickly.
inline bool agree(PyObject *const *given, intptr_t count) {
    int64_t channels = 0;
    for (intptr_t i = 0; i < count; ++i) {
        if (given[i] == known.none && i > 0) continue;
        PyObject *type = PyObject_Type(given[i]);
        Py_DecRef(type);
        if (!known.api || (type != known.tensor && type != known.parameter)) return false;
        DLTensor tensor;
        if (known.api->describe(given[i], &tensor)) {  // it is sparse, nested, or in a transform
            PyErr_Clear();
            return false;
        }
        const bool floating = tensor.kind == FLOATING_POINT || tensor.kind == BFLOAT, first = i == 0, last = i == count - 1;
        if (tensor.device[0] != CPU || !(floating || last) || (first ? tensor.axes < 2 : tensor.axes > 1)) return false;
        if (!tensor.data && first && tensor.shape[0] > 0 && tensor.shape[1] > 0) return false;  // it may have no memory
        if (first) channels = tensor.shape[1];
        else if ((tensor.axes ? tensor.shape[0] : 1) != (last ? 1 : channels) || (tensor.axes == 0 && !last)) return false;
    }
    return true;
}

constexpr char OTHER_VERSION[] =
    "expected the arguments that the compiled kernels read, got others: the library belongs to another version. "
    "Reinstall syncnorm, or in a checkout run python -m syncnorm.kernels.cpu.build";

// Reads the arguments of a function and runs it without Python's lock. Any error is raised in Python: of the arguments,
// or of the function, which has then written nothing.
template <class Arguments>
PyObject *call(PyObject *const *given, intptr_t count, int (*function)(const Arguments &)) {
    Arguments arguments;
    Values values(given, count);
    read(values, arguments);
    if (!values.are_read()) PyErr_SetString(known.other_error, OTHER_VERSION);
    if (PyErr_Occurred()) return nullptr;
    void *thread = PyEval_SaveThread();
    const int failure = function(arguments);
    PyEval_RestoreThread(thread);
    if (failure) {
        PyErr_SetNone(failure == MISMATCH ? known.mismatch : known.no_memory);
        return nullptr;
    }
    Py_IncRef(known.none);
    return known.none;
}

}  // namespace

// A pass over tensors of any dtype, as a function of Python.
#define PASS(function, Arguments, dtype) \
    {#function, [](PyObject *, PyObject *const *given, intptr_t count) { \
        return call<Arguments>(given, count, [](const Arguments &a) { \
            switch (dtype) { \
                case FLOAT32: return function<float>(a); \
                case FLOAT64: return function<double>(a); \
                case BFLOAT16: return function<bf16>(a); \
                default: return function<fp16>(a); \
            } \
        }); \
    }, METH_FASTCALL, nullptr}

// The functions of one instruction set have its name.
#define JOIN(a, b) a##b
#define NAME(prefix, isa) JOIN(prefix, isa)
#define EXPORT extern "C" __attribute__((visibility("default")))
