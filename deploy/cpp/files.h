// Finds and reads files, as step3_infer.py does.

#pragma once

#include <glob.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "formats.h"
#include "problem.h"

namespace fs = std::filesystem;
using std::string;

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

// Whether a file is an image, by its suffix or, if that is not one of an image, by its content.
// Only formats whose first bytes nothing else has count then: a camera's raw photo begins as a
// TIFF, and a text may begin with the letters of a BMP, though not with its zeros.
inline bool is_image(const fs::path& path) {
  const string suffix = suffix_of(path);
  if (!suffix.empty() && (IMAGE_SUFFIXES + " ").find(suffix + " ") != string::npos) return true;

  std::error_code error;
  if (!fs::is_regular_file(path, error)) return false;  // to open a named pipe would wait
  string start(16, '\0');
  std::ifstream(path, std::ios::binary).read(start.data(), start.size());
  const string format = format_of(start);
  if (format == "BMP") return starts_with(start, string(4, '\0'), 6);
  return format == "PNG" || format == "JPEG" || format == "GIF" || format == "WebP";
}

// Whether a name is neither hidden, like .DS_Store, nor a file of the system.
inline bool is_visible(string name) {
  for (char& c : name) c = std::tolower(static_cast<unsigned char>(c));
  const std::set<string> of_system = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx"};
  return name[0] != '.' && of_system.count(name) == 0;
}

// Whether to go on with a folder below `place`: links are followed, though nowhere twice, nor up.
inline bool enter(const fs::path& place, const fs::path& folder, std::set<fs::path>& entered) {
  std::error_code error;
  const fs::path real = fs::canonical(folder, error);
  if (error) return false;

  const fs::path above = fs::canonical(place, error);
  const auto [end, _] = std::mismatch(real.begin(), real.end(), above.begin(), above.end());
  const bool leads_up = fs::is_symlink(folder, error) && end == real.end() && real != above;
  return !leads_up && entered.insert(real).second;
}

// What is below a directory.
struct Below {
  std::vector<string> images;
  std::vector<string> others;  // files that are no images
  std::set<fs::path> entered;  // folders, without links
};

// Adds the files below a directory in name order, its own before those of its subdirectories. A
// directory that cannot be read counts as an image, so that read_file reports it.
inline void walk(const fs::path& directory, Below& below) {
  std::vector<fs::path> files;
  std::vector<fs::path> folders;
  std::error_code error;
  fs::directory_iterator entry(directory, error);
  for (const fs::directory_iterator end; entry != end; entry.increment(error)) {
    std::error_code ignored;  // for example of a dangling link
    if (!is_visible(entry->path().filename().string())) continue;
    (entry->is_directory(ignored) ? folders : files).push_back(entry->path());
  }
  if (error) below.images.push_back(directory.string());

  std::sort(files.begin(), files.end());
  for (const auto& file : files)
    (is_image(file) ? below.images : below.others).push_back(file.string());

  std::sort(folders.begin(), folders.end());
  std::vector<fs::path> entered;
  for (const auto& folder : folders)
    if (enter(directory, folder, below.entered)) entered.push_back(folder);
  for (const auto& folder : entered) walk(folder, below);
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
// matches. Files in directories that are not images are added to `others`. Throws Problem.
inline std::vector<string> find_images(const string& path, std::vector<string>& others) {
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

  for (const auto& directory : directories) {
    Below below;
    below.entered.insert(fs::canonical(directory, error));
    walk(directory, below);
    found.insert(found.end(), below.images.begin(), below.images.end());
    others.insert(others.end(), below.others.begin(), below.others.end());
  }
  if (found.empty()) throw Problem("no images in this directory");
  return found;
}
