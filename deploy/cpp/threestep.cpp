// Predicts from a model.pt that step2_export.py made: what step3_infer.py does, on LibTorch and without Python.
//
//     threestep --model model.pt --top-k 3 photos/ 'more/*.jpg'
//     threestep --format json photos/ > predictions.jsonl
//     threestep --self-test                  # does this machine compute what the training machine did?
//
// Resizing, normalising and softmax are inside the file; so are the class names, in its spec. This program decodes
// an image to uint8 [1, height, width, channels] and prints what the file makes of it.
// Exit codes: 0 done, 1 some input could not be used, 2 usage.

#include <ATen/Parallel.h>
#include <torch/script.h>
#include <torch/version.h>

#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <thread>

#include "image.h"
#include "text.h"

using nlohmann::json;

constexpr int SCHEMA = 1;                     // the newest spec this program understands
constexpr double SELF_TEST_TOLERANCE = 1e-4;  // float32 engines differ by about 1e-6
const char* const USAGE =
    "usage: threestep [--model FILE] [--threads N] [--format text|json] [--top-k K] [--self-test] [PATH ...]\n\n"
    "Predict from a TorchScript file that step2_export.py made.\n\n"
    "  PATH          image files (PNG, JPEG, BMP, GIF), directories (recursively), globs\n"
    "  --model FILE  default: model.pt beside this program, else in the current directory\n"
    "  --threads N   CPU threads (default: as many as this process may use)\n"
    "  --format F    text, or json: one object a line (default: text)\n"
    "  --top-k K     classes to name, best first (default: 3)\n"
    "  --self-test   run the golden samples inside the file and compare\n";

struct Options {
  std::vector<string> paths;
  string model, format = "text";
  int threads = 0, top_k = 3;
  bool self_test = false, help = false;
};

// The first line of what an exception says, without LibTorch's stack trace.
string reason(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  const string text = of_torch ? of_torch->what_without_backtrace() : error.what();
  return text.substr(0, text.find('\n'));
}

void say(const string& message) { std::cerr << printable(message) << std::endl; }

// --------------------------------------------------------------------------------------------------------- model

struct Model {
  string path;
  torch::jit::Module module;
  json spec;
  std::vector<string> classes;
  int channels;
};

// Reads what `spec.json` says into the model. Throws Problem where it is missing, malformed or too new.
void read_spec(const string& text, Model& model) {
  if (text.empty()) throw Problem(model.path + " carries no spec: it was not made by step2_export.py");
  try {
    model.spec = json::parse(text);
    if (model.spec.at("schema").get<double>() > SCHEMA)
      throw Problem(model.path + " has a spec of schema " + model.spec["schema"].dump() + ", this program knows " +
                    std::to_string(SCHEMA) + ": use the program of the Threestep that made it");
    if (model.spec.at("task") == "regression")
      throw Problem(model.path + " predicts from numbers, which only step3_infer.py --values does", 2);
    model.spec.at("classes").get_to(model.classes);
    model.spec.at("channels").get_to(model.channels);
    if (model.spec["task"] != "classification" || model.classes.size() < 2 ||
        (model.channels != 1 && model.channels != 3))
      throw Problem(model.path + " has a malformed spec: its task, classes or channels make no sense");
  } catch (const json::exception& error) {
    throw Problem(model.path + " has a malformed spec: " + error.what());
  }
}

Model load(const string& path, int threads) {
  std::error_code error;
  if (!fs::is_regular_file(path, error)) throw Problem("no model file " + path + "; python step2_export.py makes one");
  at::set_num_threads(threads ? std::min(threads, 1024) : int(std::thread::hardware_concurrency()));
  Model model{path};
  torch::jit::ExtraFilesMap extra{{"spec.json", ""}};
  try {
    model.module = torch::jit::load(path, torch::kCPU, extra);
    model.module.eval();
  } catch (const std::exception& error) {
    throw Problem(path + " is not a TorchScript file that LibTorch " TORCH_VERSION " can run: " + reason(error));
  }
  read_spec(extra["spec.json"], model);
  return model;
}

// -> probabilities [classes]. Throws Problem.
std::vector<float> predict(Model& model, Image& image) {
  const c10::InferenceMode guard;  // keeps nothing for gradients
  torch::Tensor output;
  try {
    const std::vector<int64_t> shape = {1, image.height, image.width, model.channels};
    const torch::Tensor input = torch::from_blob(image.pixels.data(), shape, torch::kUInt8);
    output = model.module.forward({input}).toTensor().to(torch::kFloat).contiguous();
  } catch (const std::exception& error) {
    throw Problem("the model cannot run, its spec is wrong perhaps: " + reason(error));
  }
  if (output.dim() != 2 || output.size(1) != int64_t(model.classes.size()))
    throw Problem("the file's spec is wrong: " + std::to_string(model.classes.size()) + " classes, " +
                  std::to_string(output.numel()) + " outputs");
  return {output.data_ptr<float>(), output.data_ptr<float>() + output.numel()};
}

// Runs the golden samples inside the file, prints how far they are from what the network said; -> the exit code.
int self_test(Model& model) {
  const json golden = model.spec.value("golden", json::array());
  if (golden.empty()) throw Problem("this file carries no golden samples to test with");
  double difference = 0;
  try {
    for (const json& sample : golden) {
      Image image = decode(base64_bytes(sample.at("image")), model.channels);
      const std::vector<double> expected = sample.at("probabilities");
      const std::vector<float> outputs = predict(model, image);
      if (outputs.size() != expected.size()) throw Problem("wrong number of probabilities");
      for (size_t k = 0; k < outputs.size(); k++) {
        const double worse = std::abs(outputs[k] - expected[k]);
        if (!(worse <= difference)) difference = worse;  // which keeps NaN, as max does not
      }
    }
  } catch (const std::exception& error) {
    throw Problem("this file's golden samples are malformed: " + reason(error));
  }
  const bool passed = difference <= SELF_TEST_TOLERANCE;
  std::printf("self-test %s: %zu golden samples, max difference %.1e\n", passed ? "passed" : "FAILED", golden.size(),
              difference);
  return passed ? 0 : 1;
}

// ----------------------------------------------------------------------------------------------------------- CLI

const char* const UNWRITABLE = "cannot write to standard output";
const char* const HELP = " (--help shows all options)";

// The model beside this program, else in the current directory. Throws Problem where there is none.
string find_model() {
  std::error_code error;  // where there is no /proc, the program's place is unknown
  const fs::path beside = fs::read_symlink("/proc/self/exe", error).replace_filename("model.pt");
  for (const fs::path& path : {beside, fs::path("model.pt")})
    if (fs::is_regular_file(path, error)) return path.string();
  throw Problem("no model.pt beside this program or in the current directory; give --model, or run step2_export.py", 2);
}

// An input that cannot be used: a line of its own, and for programs one among the results; -> false.
bool refuse(const string& path, const string& why, const Options& options) {
  say("error: " + path + ": " + why);
  if (options.format == "json")
    std::cout << "{\"path\": " << quoted(path) << ", \"error\": " << quoted(why) << "}\n";
  return false;
}

// One line for an image: its classes, best first.
void write(const string& path, const std::vector<float>& probabilities, const Model& model, const Options& options) {
  std::vector<size_t> best(probabilities.size());
  std::iota(best.begin(), best.end(), 0);
  std::stable_sort(best.begin(), best.end(), [&](size_t a, size_t b) { return probabilities[a] > probabilities[b]; });
  best.resize(std::min<size_t>(options.top_k, best.size()));
  std::vector<string> fields;
  string text = printable(path);
  for (const size_t k : best) {
    char number[32];
    std::snprintf(number, sizeof number, "%.6f", probabilities[k]);
    const double rounded = std::atof(number);
    fields.push_back("\"label\": " + quoted(model.classes[k]) + ", \"probability\": " + json(rounded).dump());
    std::snprintf(number, sizeof number, " %.2f%%", rounded * 100);
    text += "  " + printable(model.classes[k]) + number;
  }
  if (options.format == "text") {
    std::cout << text << "\n";
    return;
  }
  std::cout << "{\"path\": " << quoted(path) << ", " << fields[0] << ", \"top\": [";
  for (size_t k = 0; k < fields.size(); k++) std::cout << (k ? ", {" : "{") << fields[k] << "}";
  std::cout << "]}\n";
}

// Predicts one image, or says why not; -> whether it could be used.
bool answer(const string& path, Model& model, const Options& options) {
  Image image;
  try {
    image = decode(read_file(path), model.channels);
  } catch (const Problem& problem) {
    return refuse(path, problem.what(), options);
  } catch (const std::bad_alloc&) {
    return refuse(path, "is too large for this machine's memory", options);
  }
  write(path, predict(model, image), model, options);
  return true;
}

// A count given as an option's value.
int positive(const string& option, const string& text) {
  if (text.empty() || text.size() > 6 || text.find_first_not_of("0123456789") != string::npos || std::stoi(text) < 1)
    throw Problem("argument " + option + ": '" + text + "' is not a whole number from 1 to 999999" + HELP, 2);
  return std::stoi(text);
}

Options parse(const std::vector<string>& arguments) {
  Options options;
  bool only_paths = false;
  for (size_t k = 0; k < arguments.size(); k++) {
    const string &argument = arguments[k], option = argument.substr(0, argument.find('='));
    const auto value = [&] {
      if (option.size() < argument.size()) return argument.substr(option.size() + 1);
      if (k + 1 == arguments.size()) throw Problem("argument " + option + ": expected one argument" + HELP, 2);
      return arguments[++k];
    };
    if (only_paths || argument.size() < 2 || argument[0] != '-')
      options.paths.push_back(argument);
    else if (argument == "--")
      only_paths = true;
    else if (option == "--model")
      options.model = value();
    else if (option == "--threads")
      options.threads = positive(option, value());
    else if (option == "--top-k")
      options.top_k = positive(option, value());
    else if (option == "--format")
      options.format = value();
    else if (argument == "--self-test")
      options.self_test = true;
    else if (argument == "--help" || argument == "-h")
      options.help = true;
    else
      throw Problem("unrecognized arguments: " + argument + HELP, 2);
  }
  if (options.format != "text" && options.format != "json")
    throw Problem("argument --format: invalid choice: '" + options.format + "' (choose from text, json)" + HELP, 2);
  if (options.paths.empty() && !options.self_test && !options.help)
    throw Problem(string("give at least one PATH: an image, a directory or a glob") + HELP, 2);
  return options;
}

// The work of main; -> the exit code.
int run(const std::vector<string>& arguments) {
  Options options = parse(arguments);
  if (options.help) {
    std::cout << USAGE;
    return 0;
  }
  if (options.model.empty()) {
    options.model = find_model();
    say("model: " + options.model);
  }
  Model model = load(options.model, options.threads);
  if (options.self_test) return self_test(model);
  bool all = true;
  for (const string& given : options.paths) {
    std::vector<string> found;
    try {
      found = find_images(given);
    } catch (const Problem& problem) {
      all = refuse(given, problem.what(), options);
    }
    for (const string& path : found) {
      all = answer(path, model, options) && all;
      if (!std::cout) throw Problem(UNWRITABLE);  // rather than compute on for nobody
    }
  }
  return all ? 0 : 1;
}

int main(int count, char** values) {
  int code = 1;
  try {
    code = run({values + 1, values + count});
    if (!std::cout.flush()) throw Problem(UNWRITABLE);
  } catch (const Problem& problem) {
    say(string("error: ") + problem.what());
    code = problem.code;
  } catch (const std::bad_alloc&) {
    say("error: not enough memory");
  } catch (const std::exception& error) {
    say("error: " + reason(error));
  }
  return code;
}
