//! A value's copy on a device, made at its first use there and kept with the value. It does not depend on operations.

use std::fmt;
use std::sync::{Arc, Mutex};

use anyhow::Result;

use super::{Device, lock};

type Slot<T> = Mutex<Option<(Device, Arc<T>)>>;

/// The copy on the device that last used it. A clone shares the copy; two values compare equal whatever their copies are, so
/// that a type with a `Resident` field can still be compared.
pub struct Resident<T>(Arc<Slot<T>>);

impl<T> Resident<T> {
    /// The copy on `device`; `make` makes it if there is none.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn on(&self, device: &Device, make: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
        let mut slot = lock(&self.0);
        if let Some((place, copy)) = &*slot
            && place.ptr_eq(device)
        {
            return Ok(Arc::clone(copy));
        }
        // The old copy is freed before the new one is made.
        *slot = None;
        let copy = Arc::new(make()?);
        *slot = Some((device.clone(), Arc::clone(&copy)));
        Ok(copy)
    }

    /// Puts a copy that was made elsewhere in place of the one that is there.
    pub fn put(&self, device: &Device, copy: Arc<T>) {
        *lock(&self.0) = Some((device.clone(), copy));
    }

    /// The copy, wherever it lies.
    pub fn get(&self) -> Option<Arc<T>> {
        lock(&self.0).as_ref().map(|(_, copy)| Arc::clone(copy))
    }

    /// Frees the copy.
    pub fn clear(&self) {
        *lock(&self.0) = None;
    }
}

impl<T> Default for Resident<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> Clone for Resident<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> PartialEq for Resident<T> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl<T> fmt::Debug for Resident<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if lock(&self.0).is_some() { "Resident(on a device)" } else { "Resident(none)" })
    }
}
