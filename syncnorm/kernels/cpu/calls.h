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

inline void read(Values &values, Parameters &parameters) {
    parameters.weight = values.tensor().vector();
    parameters.bias = values.tensor().vector();
}

inline void read(Values &values, Epilogue &epilogue) {
    epilogue.activation = values.integer();
    epilogue.residual = values.pointer<void>();
    epilogue.signs = values.pointer<uint8_t>();
    epilogue.inplace = values.integer();
}

inline void read(Values &values, Running &running) {
    running = {};
    if (values.is_none()) return;
    Values of = values.tuple();
    running.given = true;
    running.mean = of.tensor().vector();
    running.var = of.tensor().vector();
    running.batches = of.pointer<int64_t>();
    running.cumulative = of.is_none();
    if (!running.cumulative) running.momentum = of.number();
}

inline void read(Values &values, MomentsArguments &arguments) {
    const Tensor x = values.tensor();
    arguments.x = x.data;
    arguments.shape = shape_of(x, values);
    arguments.mask = values.pointer<void>();
    arguments.moments = values.pointer<double>();
    read(values, arguments.stamp);
}

inline void read(Values &values, NormalizeArguments &arguments) {
    const Tensor x = values.tensor();
    arguments.x = x.data;
    arguments.shape = shape_of(x, values);
    arguments.y = values.pointer<void>();
    arguments.moments = values.pointer<double>();
    read(values, arguments.stamp);
    read(values, arguments.parameters);
    arguments.eps = values.number();
    arguments.eps_outside = values.integer();
    read(values, arguments.epilogue);
    arguments.statistics = values.pointer<double>();
    read(values, arguments.running);
}

inline void read(Values &values, BackwardArguments &arguments) {
    const Tensor x = values.tensor();
    arguments.x = x.data;
    arguments.shape = shape_of(x, values);
    arguments.dy = values.pointer<void>();
    arguments.statistics = values.pointer<double>();
    read(values, arguments.parameters);
    read(values, arguments.epilogue);
    arguments.mask = values.pointer<void>();
}

inline void read(Values &values, ReduceGradArguments &arguments) {
    Values of = values.tuple();
    read(of, arguments.of);
    arguments.grad_weight = values.tensor().vector();
    arguments.grad_bias = values.tensor().vector();
    arguments.sums = values.pointer<double>();
    read(values, arguments.stamp);
}

inline void read(Values &values, GradInputArguments &arguments) {
    Values of = values.tuple();
    read(of, arguments.of);
    arguments.sums = values.pointer<double>();
    read(values, arguments.stamp);
    arguments.centered = values.integer();
    arguments.eps_outside = values.number();
    arguments.dx = values.pointer<void>();
    arguments.dz = values.pointer<void>();
}

// Whether an input (N, C, *) and the vectors after it are plain tensors on the CPU, the vectors of shape (C,) and all
// floating point, and the last one has one value, of any dtype. Each but the input may be None. False if torch cannot
// say it quickly.
inline bool agree(PyObject *const *given, intptr_t count) {
    int64_t channels = 0;
    for (intptr_t i = 0; i < count; ++i) {
        if (given[i] == known.none) continue;
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
