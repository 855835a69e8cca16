// The engine that runs the model file, chosen by CMake's -DBACKEND. The header of each engine
// defines:
//
//     FORMAT, SUFFIX, MODELS    the kind of file that it runs, its suffix, and step2's names for it
//     engine()                  its name and version
//     message(error)            what an exception of its says, without a stack trace
//     Network(path, threads)    loads a file, with `threads` CPU threads; throws std::exception, or
//                               Problem, whose text is the whole message
//     network.spec              the spec of the file, as JSON text; empty without one
//     network.run(...)          runs it on an image; throws std::exception
//
// Everything else, such as the checks of the spec and of the outputs, is in threestep.cpp.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

// An output of the network.
struct Output {
  std::vector<int64_t> shape;
  std::vector<float> values;
};

#ifdef THREESTEP_TORCH
#include "backend_torch.h"
#else
#include "backend_onnxruntime.h"
#endif
