// Writes what happens into a directory: programs as files, events as lines of JSON.

#ifndef COMPILE_ONLY_TPU_RECORDER_H_
#define COMPILE_ONLY_TPU_RECORDER_H_

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace recorder {

// A number. Text comes as a std::string_view.
inline std::string json(int64_t value) { return std::to_string(value); }

inline std::string json(std::string_view text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      quoted += '\\';
      quoted += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      quoted += escaped;
    } else {
      quoted += c;
    }
  }
  return quoted + '"';
}

template <typename Value>
std::string json(const std::vector<Value>& values) {
  std::string list = "[";
  for (const Value& value : values) {
    if (list.size() > 1) list += ", ";
    list += json(value);
  }
  return list + "]";
}

// One line, built field by field.
class Event {
 public:
  explicit Event(std::string_view kind) { add("event", kind); }

  Event& add(std::string_view name, std::string_view text) {
    return add_json(name, json(text));
  }

  Event& add(std::string_view name, int64_t number) {
    return add_json(name, json(number));
  }

  template <typename Value>
  Event& add(std::string_view name, const std::vector<Value>& values) {
    return add_json(name, json(values));
  }

  std::string line() const { return "{" + text_ + "}\n"; }

 private:
  Event& add_json(std::string_view name, const std::string& value) {
    if (!text_.empty()) text_ += ", ";
    text_ += json(name) + ": " + value;
    return *this;
  }

  std::string text_;
};

class Recorder {
 public:
  // Begins a record in an existing directory that has none: two processes that wrote
  // into one directory would overwrite each other's programs.
  void open(const std::filesystem::path& directory) {
    directory_ = directory;
    const std::filesystem::path log = directory / "events.jsonl";
    if (std::filesystem::exists(log)) {
      throw std::runtime_error(log.string() + " exists: each process needs a new one");
    }
    log_.open(log);
    if (!log_) throw std::runtime_error("cannot write " + log.string());
  }

  void write(const Event& event) {
    const std::lock_guard<std::mutex> lock(mutex_);
    log_ << event.line() << std::flush;
  }

  void write_file(const std::string& name, std::string_view bytes) {
    std::ofstream file(directory_ / name, std::ios::binary);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    if (!file) throw std::runtime_error("cannot write " + name);
  }

 private:
  std::filesystem::path directory_;
  std::ofstream log_;
  std::mutex mutex_;
};

}  // namespace recorder

#endif  // COMPILE_ONLY_TPU_RECORDER_H_
