// Finds and reads files, as step3_infer.py does.

#pragma once

#include <glob.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "problem.h"

namespace fs = std::filesystem;
using std::string;

// As in step3_infer.py: a file of a kind that stb_image cannot read is an error, it is not skipped.
inline const string IMAGE_SUFFIXES =
    ".png .jpg .jpeg .webp .bmp .gif .tif .tiff .pgm .ppm .pbm .avif .jp2";

// The suffix of a file's name, in small letters.
inline string suffix_of(const fs::path& path) {
  string suffix = path.extension().string();
  for (char& c : suffix) c = std::tolower(static_cast<unsigned char>(c));
  return suffix;
}

// The bytes of a file. Throws Problem with the reason (the caller knows the name).
inline string read_file(const string& path) {
  std::error_code error;
  if (!fs::exists(path, error))
    throw Problem(error ? "cannot be read: " + error.message() : "no such file");
  if (fs::is_directory(path, error)) throw Problem("is a directory that cannot be read");
  if (!fs::is_regular_file(path, error)) throw Problem("is not a regular file");

  const uintmax_t size = fs::file_size(path, error);
  if (size > INT32_MAX) throw Problem("is larger than 2 GB");

  std::ifstream file(path, std::ios::binary);
  string bytes(file ? size : 0, '\0');
  if (!file.read(bytes.data(), bytes.size()))
    throw Problem(string("cannot be read: ") + std::strerror(errno));
  return bytes;
}

inline bool is_image(const fs::path& path) {
  const string suffix = suffix_of(path);
  return !suffix.empty() && (IMAGE_SUFFIXES + " ").find(suffix + " ") != string::npos;
}

// Adds the images below a directory in name order, its own before those of its subdirectories. A
// directory that cannot be read is added itself, so that read_file reports it.
inline void walk(const fs::path& directory, std::vector<string>& found) {
  std::vector<fs::path> files;
  std::vector<fs::path> subdirectories;
  std::error_code error;
  fs::directory_iterator entry(directory, error);
  for (const fs::directory_iterator end; entry != end; entry.increment(error)) {
    std::error_code ignored;  // for example of a dangling link
    if (!entry->is_directory(ignored)) {
      if (is_image(entry->path())) files.push_back(entry->path());
    } else if (!entry->is_symlink(ignored)) {  // a link may lead back up
      subdirectories.push_back(entry->path());
    }
  }
  if (error) found.push_back(directory.string());

  std::sort(files.begin(), files.end());
  std::sort(subdirectories.begin(), subdirectories.end());
  for (const auto& file : files) found.push_back(file.string());
  for (const auto& subdirectory : subdirectories) walk(subdirectory, found);
}

// What a pattern such as *.png matches, in name order.
inline std::vector<string> expand(const string& pattern) {
  glob_t matches{};
  glob(pattern.c_str(), 0, nullptr, &matches);
  const std::vector<string> found(matches.gl_pathv, matches.gl_pathv + matches.gl_pathc);
  globfree(&matches);
  return found;
}

// The images that `path` stands for: a file as given, those below a directory, or what a glob
// matches. Throws Problem.
inline std::vector<string> find_images(const string& path) {
  std::error_code error;
  const bool is_there = fs::exists(fs::symlink_status(path, error));
  const bool is_glob = !is_there && path.find_first_of("*?[") != string::npos;
  if (!is_glob && !fs::is_directory(path, error)) return {path};

  std::vector<string> found;
  std::vector<string> directories;
  for (const string& match : is_glob ? expand(path) : std::vector<string>{path})
    (fs::is_directory(match, error) ? directories : found).push_back(match);
  if (found.empty() && directories.empty()) throw Problem("matches no file");
  if (!found.empty()) return found;

  for (const auto& directory : directories) walk(directory, found);
  if (found.empty())
    throw Problem("no images in this directory (looked for " + IMAGE_SUFFIXES + ")");
  return found;
}
