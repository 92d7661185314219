//! A file or folder that appears whole or not at all: everything goes to a temporary name beside it, reaches the disk, and is renamed.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::ModelError;

/// What is being written.
pub(super) struct Draft {
    /// Where everything goes until it is complete.
    temporary: PathBuf,
    target: PathBuf,
    /// Whether something of that temporary name was made here, and must be removed if it is not completed.
    made: Cell<bool>,
}

/// How many drafts this process has begun: two of one output have names of their own.
static BEGUN: AtomicU64 = AtomicU64::new(0);

impl Draft {
    /// A draft of a file or folder that must not exist yet.
    pub fn new(target: &Path) -> Result<Draft, ModelError> {
        let refuse =
            |reason: &str| Err(ModelError::Quantization(format!("output: {} {reason}", target.display())));
        let Some(name) = target.file_name() else { return refuse("names no file or folder") };
        if fs::symlink_metadata(target).is_ok() {
            return refuse("exists already; name another, or remove it");
        }
        let parent = parent_of(target);
        if !parent.is_dir() {
            return refuse("lies in a folder that does not exist");
        }
        let (process, number) = (std::process::id(), BEGUN.fetch_add(1, Ordering::Relaxed));
        let name = format!(".{}.{process}-{number}.partial", name.to_string_lossy());
        Ok(Draft { temporary: parent.join(name), target: target.to_owned(), made: Cell::new(false) })
    }

    /// Makes the folder.
    pub fn make_folder(&self) -> Result<(), ModelError> {
        fs::create_dir(&self.temporary).map_err(|source| self.failed(&self.temporary, 0, &source))?;
        self.made.set(true);
        Ok(())
    }

    /// Writes one file of `bytes` bytes: the draft itself, or one of that name inside it.
    pub fn file(
        &self,
        name: Option<&Path>,
        bytes: u64,
        write: impl FnOnce(&mut File) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        let path = name.map_or_else(|| self.temporary.clone(), |name| self.temporary.join(name));
        let io = |source: io::Error| self.failed(&path, bytes, &source);
        if let Some(parent) = path.parent().filter(|_| name.is_some()) {
            fs::create_dir_all(parent).map_err(io)?;
        }
        let mut file = File::options().write(true).create_new(true).open(&path).map_err(io)?;
        self.made.set(true);
        match write(&mut file) {
            Err(ModelError::Io { source, .. }) => Err(io(source)),
            other => other,
        }?;
        file.flush().map_err(io)?;
        file.sync_all().map_err(io)
    }

    /// Gives everything its name.
    pub fn commit(self) -> Result<(), ModelError> {
        let io = |source: io::Error| self.failed(&self.target, 0, &source);
        if fs::symlink_metadata(&self.target).is_ok() {
            let path = self.target.display();
            return Err(ModelError::Quantization(format!(
                "output: {path} was made by somebody else while this was written; name another, or remove it"
            )));
        }
        fs::rename(&self.temporary, &self.target).map_err(io)?;
        self.made.set(false);
        // The new name reaches the disk with its folder; where folders cannot be opened, the system sees to it.
        if let Ok(folder) = File::open(parent_of(&self.target)) {
            folder.sync_all().map_err(|source| self.failed(&self.target, 0, &source))?;
        }
        Ok(())
    }

    fn failed(&self, path: &Path, bytes: u64, source: &io::Error) -> ModelError {
        let shown = path.strip_prefix(&self.temporary).unwrap_or(Path::new(""));
        let shown = if shown.as_os_str().is_empty() { self.target.clone() } else { self.target.join(shown) };
        let needed = if bytes > 0 { format!(" ({bytes} bytes are needed)") } else { String::new() };
        ModelError::Quantization(format!("output: cannot write {}{needed}: {source}", shown.display()))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.made.get() {
            // Whatever there is of it; an error here would hide the one that led here.
            let _ = fs::remove_file(&self.temporary).or_else(|_| fs::remove_dir_all(&self.temporary));
        }
    }
}

/// The folder that something lies in.
fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// An error of writing; [`Draft::file`] adds which file it was.
pub(super) struct WriteError(pub ModelError);

impl From<io::Error> for WriteError {
    fn from(source: io::Error) -> Self {
        WriteError(ModelError::Io { path: PathBuf::new(), source })
    }
}

impl From<ModelError> for WriteError {
    fn from(error: ModelError) -> Self {
        WriteError(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_file_appears_when_it_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model.gguf");
        let draft = Draft::new(&target).unwrap();
        draft
            .file(None, 3, |file| file.write_all(b"abc").map_err(|error| WriteError::from(error).0))
            .unwrap();
        assert!(!target.exists());
        draft.commit().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"abc");
        assert_eq!(names(folder.path()), ["model.gguf"]);
        let message = Draft::new(&target).err().unwrap().to_string();
        assert!(message.contains("exists already"), "{message}");
    }

    #[test]
    fn two_drafts_of_one_output_do_not_meet() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model.gguf");
        let text = |text: &'static [u8]| {
            move |file: &mut File| file.write_all(text).map_err(|error| WriteError::from(error).0)
        };
        let (first, second) = (Draft::new(&target).unwrap(), Draft::new(&target).unwrap());
        first.file(None, 5, text(b"first")).unwrap();
        second.file(None, 6, text(b"second")).unwrap();
        second.commit().unwrap();
        let message = first.commit().unwrap_err().to_string();
        assert!(message.contains("model.gguf was made by somebody else"), "{message}");
        assert_eq!(fs::read(&target).unwrap(), b"second");
        assert_eq!(names(folder.path()), ["model.gguf"]);
        // What lies where a draft would go is not the draft's.
        let other = Draft::new(&folder.path().join("other")).unwrap();
        fs::create_dir(&other.temporary).unwrap();
        assert!(other.make_folder().is_err() && other.file(None, 5, text(b"other")).is_err());
        let kept = other.temporary.clone();
        drop(other);
        assert!(kept.is_dir());
    }

    #[test]
    fn nothing_is_left_of_what_failed() {
        let folder = tempfile::tempdir().unwrap();
        for is_folder in [false, true] {
            let draft = Draft::new(&folder.path().join("model")).unwrap();
            if is_folder {
                draft.make_folder().unwrap();
            }
            let full = |file: &mut File| {
                file.write_all(b"half").map_err(|error| WriteError::from(error).0)?;
                Err(WriteError::from(io::Error::from(io::ErrorKind::StorageFull)).0)
            };
            let name = is_folder.then_some(Path::new("inner/model.safetensors"));
            let message = draft.file(name, 77, full).unwrap_err().to_string();
            assert!(message.contains("model") && message.contains("77 bytes"), "{message}");
            drop(draft);
            assert_eq!(names(folder.path()), [""; 0]);
        }
        assert!(Draft::new(&folder.path().join("none/model")).is_err());
        assert!(Draft::new(Path::new("/")).is_err());
    }
}
