drop function dovecote.revoke_message_key, dovecote.rotate_message_key, dovecote.known_message_keys,
              dovecote.make_message_key;
drop table dovecote.message_keys;
