revoke delete on dovecote.paused_handlers from dovecote_operator;

alter table dovecote.paused_handlers alter column sent_up_to drop default;
