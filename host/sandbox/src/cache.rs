//! Keeps compiled code, which runs with the rights of the program: so every byte of it is authenticated
//! before it is used.
//!
//! The directory and its files must belong to this user and be writable for nobody else. A file begins
//! with a hash of its name and content under a key that lies beside it. What does not match is compiled
//! again.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;

const KEY: &str = "key";
const KEY_BYTES: usize = 32;
const HASH_BYTES: usize = 32;

/// A directory of compiled code.
#[derive(Debug)]
pub(crate) struct Cache {
    dir: PathBuf,
    key: [u8; KEY_BYTES],
}

impl Cache {
    /// Opens a cache, or makes it.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let flags = (OFlags::NOFOLLOW | OFlags::DIRECTORY).bits() as i32;
        check(&OpenOptions::new().read(true).custom_flags(flags).open(dir)?)?;
        let path = dir.join(KEY);
        let key = match read_own(&path) {
            Ok(bytes) => bytes.try_into().map_err(|_| io::Error::other("the key is cut short"))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => make_key(dir, &path)?,
            Err(error) => return Err(error),
        };
        Ok(Self { dir: dir.to_owned(), key })
    }

    /// The code of a name; `None`: it is not there.
    pub(crate) fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let bytes = match read_own(&self.dir.join(name)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match bytes.split_first_chunk::<HASH_BYTES>() {
            // Hashes of this kind compare in constant time.
            Some((hash, code)) if self.hash(name, code) == *hash => Ok(Some(code.to_vec())),
            _ => Err(io::Error::other("its hash is wrong")),
        }
    }

    /// Keeps code under a name: whole and durable, or not at all.
    pub(crate) fn write(&self, name: &str, code: &[u8]) -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&self.dir)?;
        file.write_all(self.hash(name, code).as_bytes())?;
        file.write_all(code)?;
        file.as_file().sync_all()?;
        file.persist(self.dir.join(name)).map_err(|error| error.error)?;
        File::open(&self.dir)?.sync_all()
    }

    fn hash(&self, name: &str, code: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes()).update(code);
        hasher.finalize()
    }
}

/// A key that nobody else knows. Of two programs that make one at a time, one key counts.
fn make_key(dir: &Path, path: &Path) -> io::Result<[u8; KEY_BYTES]> {
    let mut key = [0; KEY_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut key)?;
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(&key)?;
    file.as_file().sync_all()?;
    match file.persist_noclobber(path) {
        Ok(_) => Ok(key),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
            let bytes = read_own(path)?;
            bytes.try_into().map_err(|_| io::Error::other("the key is cut short"))
        }
        Err(error) => Err(error.error),
    }
}

/// Reads a file that only this user can have written.
fn read_own(path: &Path) -> io::Result<Vec<u8>> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    let mut file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    check(&file)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn check(file: &File) -> io::Result<()> {
    let metadata = file.metadata()?;
    let (owner, user) = (metadata.uid(), rustix::process::geteuid().as_raw());
    if owner != user {
        return Err(io::Error::other(format!("it belongs to user {owner}, this is user {user}")));
    }
    if metadata.mode() & 0o022 != 0 {
        let mode = metadata.mode() & 0o777;
        return Err(io::Error::other(format!("others may write to it (mode {mode:o})")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn code_is_read_as_it_was_written_and_under_no_other_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let cache = Cache::open(dir.path()).expect("opens");
        cache.write("a", b"code").expect("written");
        let again = Cache::open(dir.path()).expect("opens");
        assert_eq!(again.read("a").expect("whole"), Some(b"code".to_vec()));
        assert_eq!(again.read("b").expect("none"), None);
        fs::rename(dir.path().join("a"), dir.path().join("b")).expect("renamed");
        assert!(again.read("b").is_err());
        assert_eq!(fs::read_dir(dir.path()).expect("listed").count(), 2, "the key and the code");
    }

    /// Cached code ran unchecked: 150 flipped bits gave 5 SIGSEGV and a SIGILL.
    #[test]
    fn no_flipped_bit_and_no_lost_tail_is_run() {
        let dir = tempfile::tempdir().expect("a directory");
        let cache = Cache::open(dir.path()).expect("opens");
        cache.write("a", &[7; 200]).expect("written");
        let path = dir.path().join("a");
        let whole = fs::read(&path).expect("there");
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (at % 8);
            fs::write(&path, &flipped).expect("spoilt");
            assert!(cache.read("a").is_err(), "byte {at}");
            fs::write(&path, &whole[..at]).expect("cut");
            assert!(cache.read("a").is_err(), "cut at {at}");
        }
    }

    #[test]
    fn what_others_may_write_to_is_not_trusted() {
        let dir = tempfile::tempdir().expect("a directory");
        let cache = Cache::open(dir.path()).expect("opens");
        cache.write("a", b"code").expect("written");
        let open_up = |path: &Path, mode: u32| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("changed");
        };
        open_up(&dir.path().join("a"), 0o666);
        assert!(cache.read("a").is_err());
        open_up(&dir.path().join(KEY), 0o620);
        assert!(Cache::open(dir.path()).is_err());
        open_up(&dir.path().join(KEY), 0o600);
        open_up(dir.path(), 0o777);
        let error = Cache::open(dir.path()).expect_err("anybody may write here").to_string();
        assert!(error.contains("mode 777"), "{error}");
        let link = dir.path().with_extension("link");
        open_up(dir.path(), 0o700);
        std::os::unix::fs::symlink(dir.path(), &link).expect("linked");
        assert!(Cache::open(&link).is_err(), "somebody else may own the link");
        fs::remove_file(link).expect("removed");
    }
}
