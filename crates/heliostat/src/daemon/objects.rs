//! The objects that TLS needs: credentials, and who is let in. Throttle groups, which share their ids, are with the
//! nodes that have them.
//!
//! What uses an object keeps what it needs of it, but for the rules of who is let in: those are looked up for each
//! client, so that a change of them counts at once.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use heliostat_host::tls::{Credentials, CredentialsSettings, Endpoint, Peer};

use super::{Daemon, DaemonError, NbdTls};
use crate::authz::Authz;
use crate::front::nbd::{Admits, ServerTls};

/// The most objects beside throttle groups. Few need more than two for each NBD server they speak to.
const OBJECTS_MAX: usize = 1024;

/// An object that TLS needs.
#[derive(Clone, Debug)]
pub enum Object {
    /// Certificates and a key.
    Credentials(Arc<Credentials>),
    /// Who is let in.
    Authz(Arc<Authz>),
}

/// Objects by id.
#[derive(Default)]
pub(super) struct Objects {
    /// Held to look and to change. Lock order: after throttle groups.
    by_id: Mutex<BTreeMap<String, Object>>,
}

impl Objects {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Object>> {
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admits(&self, id: &str, peer: &Peer) -> bool {
        let object = self.lock().get(id).cloned();
        matches!(object, Some(Object::Authz(authz)) if authz.admits(&peer.name))
    }
}

impl Daemon {
    /// Makes TLS credentials of that id. Files that change later are taken for the next connection; where they
    /// cannot be used, standard error is told and the old ones stay.
    ///
    /// # Errors
    /// `ObjectExists`, `TooMany`, `Credentials`.
    pub fn add_credentials(&self, id: &str, settings: CredentialsSettings) -> Result<(), DaemonError> {
        let _change = self.begin_change()?;
        self.check_id(id)?;
        let name = id.to_owned();
        let credentials = Credentials::load_and_tell(settings, move |error| {
            let _ = writeln!(
                io::stderr(),
                "heliostat: the changed files of the TLS credentials '{name}' are not used, the old ones stay: {error}"
            );
        })?;
        self.objects.lock().insert(id.to_owned(), Object::Credentials(credentials));
        Ok(())
    }

    /// Makes a rule of who is let in, of that id.
    ///
    /// # Errors
    /// `ObjectExists`, `TooMany`.
    pub fn add_authz(&self, id: &str, authz: Authz) -> Result<(), DaemonError> {
        let _change = self.begin_change()?;
        self.check_id(id)?;
        self.objects.lock().insert(id.to_owned(), Object::Authz(Arc::new(authz)));
        Ok(())
    }

    /// Replaces a rule of who is let in. It counts for the next client.
    ///
    /// # Errors
    /// `ObjectNotFound`.
    pub fn change_authz(&self, id: &str, authz: Authz) -> Result<(), DaemonError> {
        match self.objects.lock().get_mut(id) {
            Some(Object::Authz(old)) => {
                *old = Arc::new(authz);
                Ok(())
            }
            _ => Err(DaemonError::ObjectNotFound(id.to_owned())),
        }
    }

    fn check_id(&self, id: &str) -> Result<(), DaemonError> {
        let is_taken = self.throttle_group(id).is_some();
        let objects = self.objects.lock();
        if objects.len() >= OBJECTS_MAX {
            return Err(DaemonError::TooMany { what: "objects", limit: OBJECTS_MAX });
        }
        if is_taken || objects.contains_key(id) {
            return Err(DaemonError::ObjectExists(id.to_owned()));
        }
        Ok(())
    }

    /// Forgets an object of any kind. Connections that use credentials go on with them.
    ///
    /// # Errors
    /// `ObjectNotFound`, `ObjectInUse`.
    pub fn remove_object(&self, id: &str) -> Result<(), DaemonError> {
        if self.objects.lock().remove(id).is_some() {
            return Ok(());
        }
        self.remove_throttle_group(id)
    }

    /// The object of that id, where it is none but a throttle group.
    #[must_use]
    pub fn object(&self, id: &str) -> Option<Object> {
        self.objects.lock().get(id).cloned()
    }

    /// The ids of all objects but throttle groups, with what they are.
    #[must_use]
    pub fn objects(&self) -> Vec<(String, Object)> {
        self.objects.lock().iter().map(|(id, object)| (id.clone(), object.clone())).collect()
    }

    /// The TLS credentials of that id, for one side.
    ///
    /// # Errors
    /// `CredentialsNotFound`, `NotCredentials`, `CredentialsEndpoint`.
    pub fn credentials(&self, id: &str, endpoint: Endpoint) -> Result<Arc<Credentials>, DaemonError> {
        let credentials = match self.object(id) {
            Some(Object::Credentials(credentials)) => credentials,
            None if self.throttle_group(id).is_none() => {
                return Err(DaemonError::CredentialsNotFound(id.to_owned()));
            }
            _ => return Err(DaemonError::NotCredentials(id.to_owned())),
        };
        if credentials.settings().endpoint != endpoint {
            return Err(DaemonError::CredentialsEndpoint(match endpoint {
                Endpoint::Server => "server",
                Endpoint::Client => "client",
            }));
        }
        Ok(credentials)
    }

    pub(super) fn server_tls(&self, tls: &NbdTls) -> Result<ServerTls, DaemonError> {
        let credentials = self.credentials(&tls.credentials, Endpoint::Server)?;
        let admits = tls.authz.clone().map(|id| {
            let objects = Arc::clone(&self.objects);
            let admits: Admits = Arc::new(move |peer: &Peer| objects.admits(&id, peer));
            admits
        });
        Ok(ServerTls { credentials, policy: tls.policy, admits })
    }
}
